/* Random words for the key of dropout, on all devices. */
#ifndef PYLOSS_RANDOM_H
#define PYLOSS_RANDOM_H

#include <stdint.h>

/* splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators"). */
static inline uint64_t pl_next_word(uint64_t *state) {
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

#endif
