/* Stablemax cross entropy (Prieto et al., arXiv:2501.04697, section 4):
 * -log(s(x_label) / sum s(x)). */
#ifdef PL_LOSS_TABLE
PL_CLASS_LOSS(stablemax_cross_entropy, stablemax, "", none, none)
#else
INLINE void FORMULA(stablemax_cross_entropy)(class_row *row, const SCALAR *option) {
    (void)option;
    row->loss = -row->log_p;
    row->d_log_p = -1;
    row->d_log_sum = row->d_mean_log_p = 0;
}
#endif
