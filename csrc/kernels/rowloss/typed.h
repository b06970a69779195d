/* Plain names for the functions and types of one computed type, so that the drivers read as plain C
 * and are compiled once per type: f32.h and f64.h say what TYPED and VEC make of a name. A driver's
 * new function or type gets its line here. */
#ifndef PYLOSS_ROWLOSS_TYPED_H
#define PYLOSS_ROWLOSS_TYPED_H

/* Vectors; losses/formulas.h says what the formulas may use. */
#define v_set(a) VEC(set1)(a)
#define v_load(p) VEC(load)(p)
#define v_store(p, v) VEC(store)(p, v)
#define v_stream(p, v) VEC(stream)(p, v)
#define v_sum(v) VEC(sum)(v)
#define v_largest(v) VEC(hmax)(v)
#define v_fma(a, b, c) VEC(fma)(a, b, c)
#define v_exp(x) VEC(exp)(x)
#define v_decay(x) VEC(decay)(x)
#define v_expm1(x) VEC(expm1)(x)
#define v_log1p(x) VEC(log1p)(x)
#define v_reciprocal(x) VEC(reciprocal)(x)
#define v_abs(x) VEC(abs)(x)
#define v_max(a, b) VEC(max)(a, b)
#define v_min(a, b) VEC(min)(a, b)
#define v_log_grown(x, d) VEC(log_grown)(x, d)
#define v_less(a, b) VEC(less)(a, b)
#define v_equal(a, b) VEC(equal)(a, b)
#define v_select(mask, a, b) VEC(select)(mask, a, b)

/* losses/ */
#define FORMULA(name) TYPED(name)
#define SCALAR double
#define class_row TYPED(class_row)
#define pair_element TYPED(pair_element)
#define loss_element TYPED(loss_element)

/* softcap.h */
#define capped TYPED(capped)
#define cap_slope TYPED(cap_slope)

/* rows.tpl.h */
#define widen_halves TYPED(widen_halves)
#define narrow_to_halves TYPED(narrow_to_halves)
#define fetch TYPED(fetch)
#define target TYPED(target)
#define put TYPED(put)
#define put_zeros TYPED(put_zeros)
#define load_lanes TYPED(load_lanes)
#define store_lanes TYPED(store_lanes)
#define scratch_part TYPED(scratch_part)

/* weights.tpl.h */
#define weight_family TYPED(weight_family)
#define row_statistics TYPED(row_statistics)
#define statistics_in TYPED(statistics_in)
#define relative_shift TYPED(relative_shift)
#define block_factor TYPED(block_factor)

/* statistics.tpl.h */
#define row_reading TYPED(row_reading)
#define block_max TYPED(block_max)
#define block_sum TYPED(block_sum)
#define block_mean TYPED(block_mean)
#define read_block TYPED(read_block)
#define reread_block TYPED(reread_block)
#define weigh TYPED(weigh)
#define take_statistics TYPED(take_statistics)

/* gradient.tpl.h */
#define pending_gradient TYPED(pending_gradient)
#define pending_block TYPED(pending_block)
#define gradient_at TYPED(gradient_at)
#define begin_block TYPED(begin_block)
#define share_block TYPED(share_block)
#define write_step TYPED(write_step)
#define finish_block TYPED(finish_block)
#define write_gradient TYPED(write_gradient)

/* class.tpl.h */
#define class_formula TYPED(class_formula)
#define write_class_row TYPED(write_class_row)
#define class_rows TYPED(class_rows)

/* pair.tpl.h */
#define pair_formula TYPED(pair_formula)
#define pair_side TYPED(pair_side)
#define pair_mode TYPED(pair_mode)
#define pair_constants TYPED(pair_constants)
#define pair_statistics TYPED(pair_statistics)
#define pair_gradient TYPED(pair_gradient)
#define pair_step TYPED(pair_step)
#define whole_vectors TYPED(whole_vectors)
#define cap_gradient TYPED(cap_gradient)
#define pair_walk TYPED(pair_walk)
#define pair_rows TYPED(pair_rows)

/* sparse.tpl.h */
#define sparse_teacher TYPED(sparse_teacher)
#define sparse_sums TYPED(sparse_sums)
#define student_element TYPED(student_element)
#define sparse_log_sum TYPED(sparse_log_sum)
#define sparse_walk TYPED(sparse_walk)
#define rest_weights TYPED(rest_weights)
#define rest_of_teacher TYPED(rest_of_teacher)
#define sparse_rows TYPED(sparse_rows)

/* cosine.tpl.h */
#define cosine_vectors TYPED(cosine_vectors)
#define cosine_sums TYPED(cosine_sums)
#define cosine_gradient TYPED(cosine_gradient)
#define cosine_rows TYPED(cosine_rows)

/* element.tpl.h */
#define element_formula TYPED(element_formula)
#define element_rows TYPED(element_rows)

/* map.tpl.h */
#define map_rows TYPED(map_rows)
#define row_argmax TYPED(row_argmax)

#endif
