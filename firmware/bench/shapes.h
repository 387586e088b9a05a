// shapes.h: what the programs here measure alike: how often, and square layers.
#ifndef SPLITEE_BENCH_SHAPES_H
#define SPLITEE_BENCH_SHAPES_H

#define REPEATS 8 // a microsecond is 16 instructions: eight times that is finer than two

#define MAPS 16384 // elements of the largest tensor that is measured
#define WEIGHTS 9216

// A square layer whose padding keeps the size at stride 1.
#define WINDOW(in, out, size, k, s)                                                                \
    {                                                                                              \
        (in), (size), (size), (out), (size) / (s), (size) / (s), (k), (k), (s), (s), (k) / 2,      \
            (k) / 2                                                                                \
    }

// MACs of square layers for one sample.
#define CONV2D_MACS(in, out, size, k, s)                                                           \
    ((in) * (out) * (k) * (k) * ((size) / (s)) * ((size) / (s)))
#define DEPTHWISE_MACS(channels, size, s) ((channels)*9 * ((size) / (s)) * ((size) / (s)))

#endif
