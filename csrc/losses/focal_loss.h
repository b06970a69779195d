/* Focal loss (Lin et al., arXiv:1708.02002, equation 4): -(1 - p)^gamma log p, with the label's
 * probability p. */
#ifdef PL_LOSS_TABLE
PL_CLASS_LOSS(focal_loss, softmax, "gamma:real", none, none)
#else
INLINE void FORMULA(focal_loss)(class_row *row, const SCALAR *option) {
    SCALAR gamma = option[focal_loss_gamma], rest = -expm1(row->log_p), power = pow(rest, gamma);
    row->loss = -power * row->log_p;
    row->d_log_p = -power;
    /* At p = 1 the limit of (1 - p)^(gamma - 1) log p is 0. */
    if (gamma > 0 && rest > 0 && rest < 1)
        row->d_log_p += gamma * exp(row->log_p) * power / rest * row->log_p;
    row->d_log_sum = row->d_mean_log_p = 0;
}
#endif
