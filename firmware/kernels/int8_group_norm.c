// int8_group_norm.c: a group norm in 8 bits: measures each group and makes of that the weights and
// biases of a depthwise convolution of single pixels, which int8_taps.h then runs.
#include <math.h>

#include "kernels/int8.h"
#include "kernels/int8_scale.h" // to 8 bits
#include "kernels/int8_taps.h"  // the convolution

// Of groups' means, and of channels' squares, which are never negative.
static const struct int8_output MEAN = {.zero = 0, .min = -128, .max = 127};
static const struct int8_output SQUARE = {.zero = -128, .min = -128, .max = 127};

// Rounded by itself: a compiler would make one operation of a product and what it is added to.
static float product(float a, float b) {
    const volatile float rounded = a * b;
    return rounded;
}

// To the nearest of int8, halves away from 0.
static int8_t nearest(float value) {
    value = value > 127.0f ? 127.0f : value < -128.0f ? -128.0f : value;
    const int32_t whole = (int32_t)value;
    const float rest = value - (float)whole;
    return (int8_t)(whole + (rest >= 0.5f) - (rest <= -0.5f));
}

// What a group is brought to: its mean, in steps of x, and 1 / its deviation.
struct measured {
    float mean, inverse;
};

static struct measured measure(const int8_t *x, const struct int8_norm *norm, size_t group,
                               size_t size, size_t channels, size_t area) {
    const struct int8_factor of_sum = int8_factor(norm->mean_multiplier, norm->mean_shift);
    const struct int8_factor of_squares = int8_factor(norm->square_multiplier, norm->square_shift);
    int32_t sum = 0;
    float square = 0.0f;
    for (size_t channel = group * size; channel < (group + 1) * size; channel++) {
        int32_t squares = norm->epsilon[channel];
        for (size_t i = channel; i < area * channels; i += channels) {
            sum += x[i];
            squares += x[i] * x[i];
        }
        const int32_t part = int8_put(squares, of_squares, SQUARE) - SQUARE.zero;
        square += product(norm->square_scale, (float)part);
    }
    const float mean = norm->mean_scale * (float)int8_put(sum, of_sum, MEAN);
    float variance = square - product(mean, mean);
    variance = variance > norm->floor[group] ? variance : norm->floor[group];
    return (struct measured){mean, 1.0f / sqrtf(variance)};
}

void int8_group_norm(int8_t *y, const int8_t *x, const struct int8_norm *norm, size_t channels,
                     size_t groups, size_t area, const struct int8_output *to, size_t n,
                     int32_t *scratch) {
    const size_t size = channels / groups;
    int32_t *biases = scratch;
    int8_t *weights = (int8_t *)(scratch + channels);
    for (; n > 0; n--) {
        for (size_t group = 0; group < groups; group++) {
            const struct measured m = measure(x, norm, group, size, channels, area);
            for (size_t channel = group * size; channel < (group + 1) * size; channel++) {
                const float weight = product(m.inverse, norm->factor[channel]);
                weights[channel] = nearest(weight);
                biases[channel] = (int32_t)(norm->shift[channel] - product(m.mean, weight));
            }
        }
        for (size_t pixel = 0; pixel < area; pixel++, x += channels, y += channels) {
            int8_taps(y, &x, 0, 1, channels, weights, biases, to);
        }
    }
}
