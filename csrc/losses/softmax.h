/* The maps to the probabilities of the softmax family, whose functions are in formulas.h, and to
 * their logarithms. */
#ifdef PL_LOSS_TABLE
PL_ROW_MAP(softmax, softmax, 0)
PL_ROW_MAP(log_softmax, softmax, 1)
#endif
