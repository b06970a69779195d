/* Softmax cross entropy with label smoothing e (Szegedy et al., arXiv:1512.00567) and a z-loss z
 * (Chowdhery et al., arXiv:2204.02311): -(1 - e) log p_label - e mean(log p) + z log(sum e^x)^2.
 * The mean is over the classes that are not masked. */
#ifdef PL_LOSS_TABLE
PL_CLASS_LOSS(softmax_cross_entropy, softmax, "label_smoothing:real z_loss:real softcap:real",
              label_smoothing, softcap)
#else
INLINE void FORMULA(softmax_cross_entropy)(class_row *row, const SCALAR *option) {
    SCALAR smoothing = option[softmax_cross_entropy_label_smoothing],
           z = option[softmax_cross_entropy_z_loss];
    row->loss = (smoothing - 1) * row->log_p + z * row->log_sum * row->log_sum;
    if (smoothing > 0) row->loss -= smoothing * row->mean_log_p;
    row->d_log_p = smoothing - 1;
    row->d_mean_log_p = -smoothing;
    row->d_log_sum = 2 * z * row->log_sum;
}
#endif
