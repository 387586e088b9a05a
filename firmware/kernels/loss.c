// loss.c: softmax and cross-entropy, the loss of every exit.
#include "kernels/kernels.h"

#include <math.h>

void softmax_cross_entropy_forward(float *p, float *loss, uint32_t *correct, const float *logits,
                                   const uint8_t *labels, float scale, size_t classes, size_t n) {
    for (size_t sample = 0; sample < n; sample++, p += classes, logits += classes) {
        const size_t label = labels[sample];
        size_t best = 0;
        for (size_t i = 1; i < classes; i++) {
            best = logits[i] > logits[best] ? i : best;
        }
        // Without the largest logit no exponential overflows, and the sum is at least 1.
        const float largest = logits[best];
        const float below = largest - logits[label];
        float sum = 0;
        for (size_t i = 0; i < classes; i++) {
            p[i] = expf(logits[i] - largest);
            sum += p[i];
        }
        for (size_t i = 0; i < classes; i++) {
            p[i] /= sum;
        }
        if (loss) {
            // Not -log(p[label]), which is infinite once p underflows to 0.
            *loss += (logf(sum) + below) * scale;
        }
        if (correct) {
            *correct += best == label;
        }
    }
}

void softmax_distill(float *p, const float *teacher, const uint8_t *labels, float share,
                     size_t classes, size_t n) {
    for (size_t sample = 0; sample < n; sample++, p += classes, teacher += classes) {
        for (size_t i = 0; i < classes; i++) {
            p[i] -= share * teacher[i];
        }
        p[labels[sample]] += share;
    }
}

void softmax_cross_entropy_backward(float *dlogits, const float *p, const uint8_t *labels,
                                    float scale, size_t classes, size_t n) {
    for (size_t sample = 0; sample < n; sample++, p += classes, dlogits += classes) {
        for (size_t i = 0; i < classes; i++) {
            dlogits[i] += p[i] * scale;
        }
        dlogits[labels[sample]] -= scale;
    }
}
