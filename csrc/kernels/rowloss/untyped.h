/* Ends a computed type: the drivers can be included once more, for another one. */
#undef REAL
#undef V
#undef WIDTH
#undef NATIVE
#undef VEC
#undef TYPED
#undef ROWLOSS_ROWS
#undef ROWLOSS_WEIGHTS
#undef ROWLOSS_STATISTICS
#undef ROWLOSS_GRADIENT
#undef ROWLOSS_CLASS
#undef ROWLOSS_PAIR
#undef ROWLOSS_SPARSE
#undef ROWLOSS_COSINE
#undef ROWLOSS_ELEMENT
#undef ROWLOSS_MAP
