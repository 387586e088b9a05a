"""Build -> a C library that trains: forward, backward and SGD on the machine that it is put into.

An example trains the segment on a few images, and then answers them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from splitee.data import Images
from splitee.ops import Array
from splitee.place import Build
from splitee_exporters.c import to_c
from splitee_exporters.library import compiler, files, literals, run
from splitee_exporters.manifest import (
    LARGEST,
    LEARNING_TOLERANCE,
    TOLERANCE,
    File,
    Verified,
    error_of,
    hold,
    learning_errors,
)

ABOUT = "A neural network's first layers and an early exit, which learn on the microcontroller."


@dataclass(frozen=True)
class Library:
    """The files of a library by their path in its folder, and what they were made from."""

    build: Build
    files: Mapping[str, bytes]

    def file(self, verified: Verified) -> File:
        """What a manifest says of it; only what is verified has that."""
        build = self.build
        graph = build.graph
        interface = {
            "language": "C11",
            "include_path": "src",
            "input": {
                "type": "uint8",
                "shape": list(graph.input_shape),
                "scale": build.scale,
                "shift": build.shift,
            },
            "outputs": [
                {"name": name, "type": "float32", "shape": list(graph.shapes[tensor])}
                for name, tensor in (("activations", graph.cut), ("logits", graph.logits))
            ],
            "capacity": build.capacity,
            "arena_bytes": build.arena_bytes,
            "ram_bytes": build.arena_bytes + 4 * graph.weight_size + build.capacity,
            "trains": True,
        }
        return File("src/segment.c", self.files["src/segment.c"], graph, interface, verified)


def to_library(build: Build, firmware: Path, samples: Images, *, distill: float = 0.0) -> Library:
    """The library of a segment up to the build's deepest cut.

    firmware: the folder of the firmware's sources. samples: for the example; as many as two batches
    take are used. distill: the share with which that learns. Raises ModelError, naming the
    operation, for a kind that has no kernel.
    """
    build = replace(build, samples_max=0)
    generated = {
        "src/segment.c": to_c(build),
        "examples/train/main.c": _example(build, samples.x, samples.y, distill),
    }
    return Library(
        build, files(firmware, generated, _read_me(build), ABOUT, includes="core/trainer.h")
    )


def _example(build: Build, images: Array, labels: Array, distill: float) -> str:
    batch = min(build.capacity, len(images))
    count = min(2, len(images) // batch) * batch
    size = build.graph.elements(build.graph.input)
    momentum = 0.9 if build.momentum else 0.0
    share = (
        f"    .distill = {distill}f, // of the deepest exit's answers in what the others learn\n"
        if build.distills
        else ""
    )
    shown = "\n".join(f"    {{{literals(image)}}}," for image in images[:count])
    return f"""\
// main.c: trains the segment on a few images, then answers them: a place to begin.
#include <stdio.h>

#include "core/trainer.h"      // forward, backward, step
#include "protocol/messages.h" // what it learns with

#define IMAGES {count}
#define BATCH {batch} // at most segment.capacity
#define ROUNDS 20

static const uint8_t labels[IMAGES] = {{
     {literals(labels[:count])},
}};

// channel after channel, row after row
static const uint8_t images[IMAGES][{size}] = {{
{shown}
}};

static const struct message_settings settings = {{
    .learning_rate = 0.05f,
    .momentum = {momentum}f,
    .exit_weight = 1.0f, // of the exit's loss in what the layers below it learn
{share}}};

// Trains one batch; returns its loss before the step, or -1 where a value was not finite.
static float train(size_t first) {{
    struct pass pass = {{.cut = (uint8_t)(segment.cuts - 1), .upto = 1, .settings = &settings}};
    trainer_begin(&pass);
    for (size_t i = 0; i < BATCH; i++) {{
        trainer_put(i, labels[first + i], images[first + i]);
    }}
    trainer_forward(&pass, BATCH, BATCH);
    trainer_backward(&pass);
    return trainer_step(&pass) ? pass.loss : -1.0f;
}}

// The class that the exit answers for an image.
static size_t answer(const uint8_t *image) {{
    struct pass pass = {{.cut = (uint8_t)(segment.cuts - 1), .upto = 1}};
    trainer_put(0, 0, image);
    trainer_infer(&pass, 1);
    const float *const logits = segment.stages[pass.cut].logits;
    size_t best = 0;
    for (size_t i = 1; i < segment.classes; i++) {{
        best = logits[i] > logits[best] ? i : best;
    }}
    return best;
}}

int main(void) {{
    for (int round = 0; round < ROUNDS; round++) {{
        float loss = 0;
        for (size_t first = 0; first < IMAGES; first += BATCH) {{
            loss += train(first) * BATCH / IMAGES;
        }}
        printf("round %d: loss %.4f\\n", round + 1, (double)loss);
    }}
    int correct = 0;
    for (size_t i = 0; i < IMAGES; i++) {{
        correct += answer(images[i]) == labels[i];
    }}
    printf("%d of %d right\\n", correct, IMAGES);
    return 0;
}}
"""


def _read_me(build: Build) -> str:
    graph = build.graph
    image = "x".join(str(n) for n in graph.input_shape)
    ram = build.arena_bytes + 4 * graph.weight_size + build.capacity
    return f"""\
# A segment that trains, in C

A network up to `{graph.cut}`, with the early exit on top of it: images of {image} bytes in,
{graph.classes} classes out. It holds {build.capacity} images at once and takes {ram:,} bytes of
RAM, all of them static.

- Plain: compile every `.c` under `src`, with `src` as include path, and link the maths library:
  `cc -O2 -Isrc examples/train/main.c $(find src -name '*.c') -lm -o train && ./train`
- PlatformIO: put this folder into your project's `lib`.
- Arduino: put this folder into your sketchbook's `libraries`.

Then `#include "core/trainer.h"`, whose comments say how a batch is trained and an image answered;
`examples/train/main.c` does both. For speed take `-O3 -ffp-contract=fast`. Never `-ffast-math`: it
hides values that are not finite.

`manifest.json` says what the segment was made from, and how it was held to PyTorch. Everything here
is under the Apache License 2.0, see LICENSE.
"""


# ---- what verifies it ----

_CHECK = """\
#include <stdio.h>
#include <stdlib.h>

#include "core/trainer.h"
#include "protocol/messages.h"

static const struct message_settings settings = {
    .learning_rate = RATE,
    .exit_weight = 1.0f,
    .distill = DISTILL,
};

static void put(const float *values, size_t size) {
    if (fwrite(values, sizeof *values, size, stdout) != size) {
        exit(1);
    }
}

int main(void) {
    const struct stage *const last = &segment.stages[segment.cuts - 1];
    uint8_t *const record = malloc(1 + segment.input_size);
    const size_t size = 1 + (size_t)segment.input_size;
    struct pass answers = {.cut = (uint8_t)(segment.cuts - 1), .upto = 1};
    struct pass pass = {.cut = (uint8_t)(segment.cuts - 1), .upto = 1, .settings = &settings};
    for (int i = 0; i < ANSWERED; i++) {
        if (!record || fread(record, 1, size, stdin) != size) {
            return 1;
        }
        trainer_put(0, record[0], record + 1);
        trainer_infer(&answers, 1);
        put(last->activations, last->activation_size);
        put(last->logits, segment.classes);
    }
    trainer_begin(&pass);
    for (size_t i = 0; i < TRAINED; i++) {
        if (fread(record, 1, size, stdin) != size) {
            return 1;
        }
        trainer_put(i, record[0], record + 1);
    }
    trainer_forward(&pass, TRAINED, TRAINED);
    trainer_backward(&pass);
    if (!trainer_step(&pass)) {
        return 1;
    }
    put(segment.weights, segment.weight_size);
    return 0;
}
"""


def verify(
    library: Library,
    samples: Images,
    expected: Mapping[str, Array],
    learnt: Mapping[str, Array],
    rate: float,
    against: str,
    *,
    distill: float = 0.0,
    tolerance: float = TOLERANCE,
    learning_tolerance: float = LEARNING_TOLERANCE,
) -> Verified:
    """Compiles the library for this machine, runs and trains it, and compares it with PyTorch.

    samples: what it answers, one at a time: expected are the activations and logits. Of the
    first of them, as many as it holds are one batch; learnt are the weights after one step of plain
    SGD at that rate, with that share distilled. against: where these come from, for the manifest.
    Raises ExportError, naming the tensor, where one is off by more than the tolerance, MissingTool
    without a compiler.
    """
    build, graph = library.build, library.build.graph
    trained = min(build.capacity, len(samples))
    records = np.column_stack([samples.y, samples.x.reshape(len(samples), -1)])
    given = records.tobytes() + records[:trained].tobytes()
    counts = {"ANSWERED": str(len(samples)), "TRAINED": str(trained)}
    reals = {"RATE": f"{float(rate).hex()}f", "DISTILL": f"{float(distill).hex()}f"}
    said = run(library.files, _CHECK, given, counts | reals)
    values = np.frombuffer(said, np.float32)
    sizes = graph.elements(graph.cut), graph.elements(graph.logits)
    answers = values[: len(samples) * sum(sizes)].reshape(len(samples), sum(sizes))
    found = {
        "activations": answers[:, : sizes[0]].reshape(expected["activations"].shape),
        "logits": answers[:, sizes[0] :],
    }
    weights = graph.unflatten(values[answers.size :])
    errors = {name: error_of(found[name], expected[name]) for name in found}
    learning = learning_errors(weights, learnt)
    allowed = dict.fromkeys(errors, tolerance)
    allowed |= dict.fromkeys((f"learnt {name}" for name in learning), learning_tolerance)
    for name, error in (errors | {f"learnt {n}": e for n, e in learning.items()}).items():
        hold(f"src/segment.c: {name}", error, allowed[name], against)
    same = found["logits"].argmax(1) == expected["logits"].argmax(1)
    return Verified(
        runtime=f"{compiler()}, this machine, one step of training included",
        against=against,
        samples=len(samples),
        batches=(1, trained),
        error=max(errors.values()),
        measure=LARGEST,
        tolerance=tolerance,
        same_class=float(same.mean()),
    )
