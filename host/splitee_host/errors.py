"""The words for what devices refuse: a device sends numbers, the host owns the words.

A step that was not taken is the training's business, not the link's: ``splitee.errors.NotFinite``.
"""

from __future__ import annotations

from splitee_host.wire import messages as m

_WORDS: dict[int, str] = {
    m.Error.UNKNOWN_MESSAGE: "it knows no message {detail:#04x}: run `splitee build`",
    m.Error.BAD_LENGTH: "its body had {detail} bytes: run `splitee build`",
    m.Error.NO_SUCH_REGION: "it has no region {detail}: run `splitee build`",
    m.Error.OUT_OF_RANGE: "the most it takes there is {detail} bytes",
    m.Error.READ_ONLY: "region {region} cannot be written now",
    m.Error.TOO_MANY_SAMPLES: "the most it takes is {detail} samples",
    m.Error.NO_DATA: "it holds no samples: start it with its shard first",
    m.Error.OUT_OF_ORDER: "that comes at the wrong time (phase {detail})",
    m.Error.BAD_LABEL: "a sample has the label {detail}, which the network has no class for",
    m.Error.NO_MOMENTUM: "it was built without momentum: run `splitee build` with momentum > 0",
    m.Error.BAD_STEP: "its segment has {detail} steps",
    m.Error.NOT_WHOLE: "its updates are fused: a batch is one part of at most {detail} samples",
    m.Error.NO_CLIP: "its updates are fused: it cannot clip; take no clip, or fused_update = false",
    m.Error.LOCAL_ONLY: "it was built with local_only: it has no room for the server's gradient",
    m.Error.NO_DISTILL: "it was built without distill: run `splitee build` with distill > 0",
    m.Error.BAD_CODEC: "it has no codec {detail} for samples of this size: run `splitee build`",
    m.Error.BAD_CODE: "the coded gradient of sample {detail} is no code",
    m.Error.INFERS_ONLY: "it answers images only, in 8 bits: run `splitee build` without --int8",
    m.Error.NO_SUCH_CUT: "its segment has {detail} cuts: run `splitee build`",
}


def refusal(asked: m.Message, refused: m.Refused) -> str:
    """What was refused and why, in words."""
    words = _WORDS.get(refused.error, f"error {refused.error}, detail {refused.detail}")
    region = m.Region(refused.detail).name if refused.detail in list(m.Region) else refused.detail
    why = words.format(detail=refused.detail, region=region)
    return f"{type(asked).__name__} refused: {why}"
