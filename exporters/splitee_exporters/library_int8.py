"""Int8Build -> a C library that answers images in 8 bits, bit for bit as TensorFlow Lite does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from splitee.data import Images
from splitee.errors import ExportError
from splitee.ops import Array
from splitee.place import Build
from splitee.place_int8 import Int8Build
from splitee_exporters.c_int8 import to_c
from splitee_exporters.library import compiler, files, literals, run
from splitee_exporters.manifest import INT8_TOLERANCE, MEAN_SQUARE, File, Verified, error_of, hold

ABOUT = "A neural network's first layers and an early exit, which answers images in 8 bits."
SHOWN = 16  # images in the example, at most


@dataclass(frozen=True)
class Library:
    """The files of a library by their path in its folder, and what they were made from."""

    build: Int8Build
    files: Mapping[str, bytes]

    @property
    def outputs(self) -> dict[str, str]:
        """The names of its outputs, and which of the graph's tensors they are."""
        return {"activations": self.build.graph.cut, "logits": self.build.graph.logits}

    def file(self, source: Build, verified: Verified) -> File:
        """What a manifest says of it; only what is verified has that.

        source: what was quantised.
        """
        graph = self.build.graph

        def described(tensor: str) -> dict[str, Any]:
            shape = list(graph.shapes[tensor])
            return {"type": "int8", "shape": shape, **asdict(graph.scales[tensor])}

        interface = {
            "language": "C11",
            "include_path": "src",
            "input": {
                **described(graph.input),
                "bytes": {"scale": source.scale, "shift": source.shift},
            },
            "outputs": [{"name": n, **described(tensor)} for n, tensor in self.outputs.items()],
            "arena_bytes": self.build.plan.size,
            "ram_bytes": self.build.plan.size,
            "trains": False,
        }
        name = "src/segment.c"
        return File(name, self.files[name], source.graph, interface, verified)


def to_library(build: Int8Build, firmware: Path, samples: Images) -> Library:
    """The library of a segment in 8 bits.

    firmware: the folder of the firmware's sources. samples: for the example. Raises ModelError,
    naming the operation, for what has no kernel.
    """
    generated = {
        "src/segment.c": to_c(build),
        "src/quantized.h": _header(build),
        "src/quantized.c": _conversion(build),
        "examples/answer/main.c": _example(build, samples[:SHOWN]),
    }
    made = files(firmware, generated, _read_me(build), ABOUT, includes="quantized.h")
    return Library(build, made)


def _header(build: Int8Build) -> str:
    graph = build.graph
    image = "x".join(str(n) for n in (graph.input_shape[-1], *graph.input_shape[:-1]))
    constants = []
    for name, tensor in (("ACTIVATIONS", graph.cut), ("LOGITS", graph.logits)):
        scale = graph.scales[tensor]
        constants.append(f"#define {name}_SCALE {scale.scale!r}f")
        constants.append(f"#define {name}_ZERO ({scale.zero_point})")
    lines = "\n".join(constants)
    return f"""\
// quantized.h: from an image to the answers of the segment, and what these mean.
#ifndef QUANTIZED_H
#define QUANTIZED_H

#include <stdint.h>

#include "core/segment.h" // struct segment

#ifdef __cplusplus
extern "C" {{
#endif

// A value q of an answer means scale x (q - zero).
{lines}

// Makes an image the segment's input: {image} bytes, channel after channel, row after row.
void quantized_image(const uint8_t *image);

// Answers it: int8 values, the channels of a pixel together, in segment.stages[0].activations, and
// one for each class in segment.stages[0].logits.
void quantized_answer(void);

#ifdef __cplusplus
}}
#endif

#endif
"""


def _conversion(build: Int8Build) -> str:
    table = build.graph.table
    rows = "\n".join(f"    {{{literals(row)}}}," for row in table)
    return f"""\
// quantized.c: Generated with segment.c: what a byte of an image is as input, for each channel.
#include "quantized.h" // itself

static const int8_t table[{len(table)}][256] = {{
{rows}
}};

void quantized_image(const uint8_t *image) {{
    int8_t *const input = segment.input;
    const size_t channels = segment.channels, area = segment.input_size / channels;
    for (size_t c = 0; c < channels; c++) {{
        for (size_t i = 0; i < area; i++) {{
            input[i * channels + c] = table[c][image[c * area + i]];
        }}
    }}
}}

void quantized_answer(void) {{
    struct pass pass = {{.count = 1}};
    for (unsigned step = 0; step < segment.infer_end; step++) {{
        segment_run(step, &pass);
    }}
}}
"""


def _example(build: Int8Build, samples: Images) -> str:
    size = build.graph.elements(build.graph.input)
    shown = "\n".join(f"    {{{literals(image)}}}," for image in samples.x)
    return f"""\
// main.c: answers a few images: a place to begin.
#include <stdio.h>

#include "quantized.h" // the segment

#define IMAGES {len(samples)}

static const uint8_t labels[IMAGES] = {{
     {literals(samples.y)},
}};

// channel after channel, row after row
static const uint8_t images[IMAGES][{size}] = {{
{shown}
}};

int main(void) {{
    int correct = 0;
    for (int i = 0; i < IMAGES; i++) {{
        quantized_image(images[i]);
        quantized_answer();
        const int8_t *const logits = segment.stages[0].logits;
        int best = 0;
        for (int k = 1; k < segment.classes; k++) {{
            best = logits[k] > logits[best] ? k : best;
        }}
        const double logit = (double)LOGITS_SCALE * (logits[best] - LOGITS_ZERO);
        printf("image %d: class %d, logit %.2f, label %d\\n", i, best, logit, labels[i]);
        correct += best == labels[i];
    }}
    printf("%d of %d right\\n", correct, IMAGES);
    return 0;
}}
"""


def _read_me(build: Int8Build) -> str:
    graph = build.graph
    image = "x".join(str(n) for n in (graph.input_shape[-1], *graph.input_shape[:-1]))
    return f"""\
# A segment in 8 bits, in C

A network up to `{build.cut}`, with the early exit on top of it: images of {image} bytes in,
{graph.classes} classes out, in TensorFlow Lite's arithmetic. It takes {build.plan.size:,} bytes of
RAM, all of them static.

- Plain: compile every `.c` under `src`, with `src` as include path:
  `cc -O2 -Isrc examples/answer/main.c $(find src -name '*.c') -o answer && ./answer`
- PlatformIO: put this folder into your project's `lib`.
- Arduino: put this folder into your sketchbook's `libraries`.

Then `#include "quantized.h"`, whose comments say how an image is answered and what the answers
mean; `examples/answer/main.c` does it. Cortex-M4, M7 and M33 multiply two values at once, and the
M55 sixteen, where the compiler is told of the core (`-mcpu=cortex-m4`).

`manifest.json` says what the segment was made from, and how it was held to PyTorch. Everything here
is under the Apache License 2.0, see LICENSE.
"""


# ---- what verifies it ----

_CHECK = """\
#include <stdio.h>
#include <stdlib.h>

#include "quantized.h"

static void put(const void *values, size_t size) {
    if (fwrite(values, 1, size, stdout) != size) {
        exit(1);
    }
}

int main(void) {
    static uint8_t image[SIZE];
    while (fread(image, 1, SIZE, stdin) == SIZE) {
        quantized_image(image);
        quantized_answer();
        put(segment.stages[0].activations, segment.stages[0].activation_size);
        put(segment.stages[0].logits, segment.classes);
    }
    return 0;
}
"""


def verify(
    library: Library, images: Array, expected: Mapping[str, Array], against: str
) -> Verified:
    """Compiles the library for this machine, runs it on uint8 images, and compares its answers.

    They have to be those of the graph, bit for bit, and, in floats, near to what is expected.
    against: where that comes from, for the manifest. Raises ExportError, naming the output, where
    that is not so, MissingTool without a compiler.
    """
    graph = library.build.graph
    size = graph.elements(graph.input)
    said = run(library.files, _CHECK, images.tobytes(), {"SIZE": str(size)})
    sizes = graph.elements(graph.cut), graph.elements(graph.logits)
    answers = np.frombuffer(said, np.int8).reshape(len(images), sum(sizes))
    own = graph.run(graph.image(images))
    found = dict(zip(library.outputs, np.split(answers, [sizes[0]], axis=1), strict=True))
    worst = 0.0
    for name, tensor in library.outputs.items():
        q = found[name].reshape(own[tensor].shape)
        if not np.array_equal(q, own[tensor]):
            raise ExportError(
                f"src/segment.c: its {name} are not those that the same numbers make in numpy, bit "
                "for bit: it is not fit for use"
            )
        real = graph.dequantize(tensor, q)
        error = error_of(real.reshape(expected[name].shape), expected[name], MEAN_SQUARE)
        worst = max(worst, error)
        hold(f"src/segment.c: {name}", error, INT8_TOLERANCE, against, MEAN_SQUARE)
    same = found["logits"].argmax(1) == expected["logits"].argmax(1)
    return Verified(
        runtime=f"{compiler()}, this machine, bit for bit",
        against=against,
        samples=len(images),
        batches=(1,),
        error=worst,
        measure=MEAN_SQUARE,
        tolerance=INT8_TOLERANCE,
        same_class=float(same.mean()),
    )
