// segment.h: what a generated segment offers to the device; build/.../segment.c defines it.
#ifndef SEGMENT_H
#define SEGMENT_H

#include <stddef.h>
#include <stdint.h>

struct message_settings; // protocol/messages.h

#ifdef __cplusplus
extern "C" {
#endif

// Stands in front of the shard's arrays: where the board has a memory for them, the port's linker
// script puts them there. By its name the section is one of .bss, which takes no flash.
#ifdef SHARD_APART
#define SEGMENT_SHARD __attribute__((section(".bss..shard")))
#else
#define SEGMENT_SHARD
#endif

// The values that one pass over a part of a batch needs beside the tensors.
struct pass {
    size_t count;          // samples in this part, 1..capacity
    size_t seen;           // samples in the parts of this batch before it
    uint8_t learns;        // 0 where images are answered only: norms take running statistics
    float inverse_batch;   // 1 / samples in the whole batch
    float exit_weight;     // weight of the exits' gradient in the trunk
    float server_weight;   // weight of the server's gradient in the trunk
    const uint8_t *labels; // count labels
    uint8_t cut;           // the stage that it ends with, the exit of which reports
    uint8_t upto;          // whether all exits up to the cut learn, or only the one at it
    float loss;       // out, added to: cross-entropy of the exit at the cut, in the batch's mean
    uint32_t correct; // out, added to: samples that this exit classified correctly
    const struct message_settings *settings; // what steps learn with
    uint8_t failed; // out: such a layer found a gradient that is not finite
    uint32_t bad;   // out, then: the first such parameter
};

// Where a step belongs: the stage, and when it runs: always, with the exit, only where the stage is
// the last, and only where all exits up to that learn, too.
enum { STEP_TRUNK, STEP_EXIT, STEP_CUT, STEP_UPTO };

struct step {
    uint8_t stage;
    uint8_t part;
};

// What lies between two cuts, and the exit on top of it. The parameters of a stage are neighbours:
// those of its trunk, which begin where the stage below ends, then those of its exit.
struct stage {
    uint32_t exit_parameters; // the first parameter of its exit
    uint32_t parameters_end;
    uint32_t activation_size; // elements per sample
    void *activations;        // capacity x activation_size, in the arena
    float *gradient;          // dLoss/dActivations, the same shape, in the arena, or NULL
    void *logits;             // capacity x classes, in the arena
};

// A segment's steps run in this order: trunk and exits forward [0, infer_end), losses
// [infer_end, forward_end), exits and trunk backward [forward_end, backward_end). Once the weights
// are updated, running statistics follow: [backward_end, step_end). Of each range, a pass runs the
// steps that its cut and its exits need.
//
// A segment of 8 bits has no steps but those of infer_end, and nothing that training needs: sizes
// are 0 there and pointers NULL.
struct segment {
    uint32_t checksum;
    uint16_t capacity;  // samples held at once
    uint16_t classes;   // labels are below this
    uint8_t value_size; // bytes of an element of input, activations and logits: 4, float; 1, int8
    uint8_t distills;   // whether the exit at the cut can teach those below
    uint16_t cuts;      // stages that the cut can be at the end of
    uint16_t infer_end, forward_end, backward_end, step_end;
    uint16_t channels;          // of the input
    uint16_t samples_max;       // records the shard has room for
    uint32_t input_size;        // elements per sample
    uint32_t parameter_size;    // float32 values that are trained
    uint32_t weight_size;       // the same and the norm statistics behind them
    uint32_t arena_size;        // bytes
    const struct step *steps;   // step_end of them
    const struct stage *stages; // cuts of them, the shallowest first
    uint8_t *arena;
    float *weights;     // weight_size values, parameters first
    float *gradients;   // parameter_size values in the arena; NULL: layers learn at once (fused.h)
    float *momentum;    // parameter_size values in the arena, or NULL
    void *input;        // capacity x input_size, in the arena; int8: NHWC
    uint8_t *shard;     // samples_max records of 1 + input_size bytes; NULL where that is 0
    uint16_t *order;    // samples_max places: this epoch's order
    uint8_t *labels;    // capacity labels of the part held
    const float *scale; // per channel: input = byte * scale + shift
    const float *shift;
};

extern const struct segment segment;

// Runs a step on the part that pass describes.
void segment_run(unsigned step, struct pass *pass);

#ifdef __cplusplus
}
#endif

#endif
