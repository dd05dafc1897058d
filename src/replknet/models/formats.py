"""Every way in which RepLKNet weights are stored, brought to the names of ``RepLKNet``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from replknet.models.replknet import Form

StateDict = dict[str, Tensor]

EMA_KEYS = ("model_ema", "state_dict_ema", "ema")
MODEL_KEYS = ("state_dict", "model")
_WRAPPERS = ("module.", "_orig_mod.")
_ANCHOR = "stem.0.conv.weight"  # in every form and every format


@dataclass(frozen=True)
class Contents:
    """Weights found in a file.

    Attributes:
        container: What was around them: "bare", "{'model'}", "trainer file, 'model_ema'", ...
        ema: Whether these are the averaged weights.
    """

    state_dict: StateDict
    container: str
    ema: bool


def unwrap(content: Mapping[str, Any], use_ema: bool | None = None) -> Contents:
    """Find the weights in what a file holds, without the prefixes of DDP and torch.compile.

    Args:
        use_ema: True asks for the averaged weights, False for the others; None takes the
            averaged ones where there are any.

    Raises:
        ValueError: There are no weights, or no averaged ones though they were asked for.
    """
    averaged = [key for key in EMA_KEYS if isinstance(content.get(key), Mapping)]
    plain = [key for key in MODEL_KEYS if isinstance(content.get(key), Mapping)]
    if use_ema and not averaged:
        raise ValueError("there are no averaged (EMA) weights; pass use_ema=False or leave it out")
    keys = {None: averaged + plain, True: averaged, False: plain}[use_ema]
    if not keys:
        if averaged:
            raise ValueError(
                f"there are only averaged weights ({averaged[0]!r}); pass use_ema=True"
            )
        return Contents(_tensors(content), "bare", ema=False)
    key = keys[0]
    trainer = len(content) > 1 and not content.keys() <= {key, "meta"}
    container = f"trainer file, {key!r}" if trainer else f"{{{key!r}}}"
    return Contents(_tensors(content[key]), container, ema=key in EMA_KEYS)


def _tensors(weights: Mapping[str, Any]) -> StateDict:
    others = [name for name, value in weights.items() if not isinstance(value, Tensor)]
    if others or not weights:
        found = ", ".join(map(repr, others[:5])) or "nothing"
        raise ValueError(
            f"there are no weights: expected named tensors, or a dict of them under "
            f"{' or '.join(map(repr, MODEL_KEYS))}, found {found}"
        )
    return {_without_wrappers(name): value for name, value in weights.items()}


def _without_wrappers(name: str) -> str:
    while name.startswith(_WRAPPERS):
        name = name.split(".", 1)[1]
    return name


@dataclass(frozen=True)
class Translation:
    """A RepLKNet's weights under the names of ``RepLKNet``.

    Attributes:
        prefix: What stood before each name, such as "backbone.".
        renamed: What was called otherwise, in words.
        ignored: Names of the file that are no part of the network.
    """

    state_dict: StateDict
    prefix: str = ""
    renamed: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


def translate(state_dict: StateDict) -> Translation:
    """Weights of the RepLKNet inside a state dict of any published layout.

    Raises:
        ValueError: There is no RepLKNet in it, or there are several.
    """
    anchors = [name for name in state_dict if name == _ANCHOR or name.endswith("." + _ANCHOR)]
    if not anchors:
        parts = list(dict.fromkeys(name.split(".")[0] for name in state_dict))
        raise ValueError(
            f"it holds no RepLKNet: there is no {_ANCHOR}; its {len(state_dict)} tensors belong "
            f"to {', '.join(parts[:6])}{', ...' if len(parts) > 6 else ''}"
        )
    if len(anchors) > 1:
        raise ValueError(f"it holds {len(anchors)} RepLKNets: {', '.join(anchors)}")
    prefix = anchors[0].removesuffix(_ANCHOR)
    inside = {n.removeprefix(prefix): v for n, v in state_dict.items() if n.startswith(prefix)}
    outside = {n: v for n, v in state_dict.items() if not n.startswith(prefix)}
    heads = {n: v for n, v in outside.items() if n in ("head.fc.weight", "head.fc.bias")}
    draft = Translation(
        {**inside, **heads}, prefix, (), tuple(n for n in outside if n not in heads)
    )
    for step in (_rename_22k_head, _rename_mmpretrain, _sum_fused_branches):
        draft = step(draft)
    return draft


def _rename_22k_head(draft: Translation) -> Translation:
    return _renamed(draft, r"head\.cls_22k\.", "head.", "head.cls_22k -> head")


def _rename_mmpretrain(draft: Translation) -> Translation:
    """The classifier is ``head.fc``, and the final norm counts as the last stage's."""
    names = draft.state_dict
    if "head.fc.weight" not in names:
        return draft
    draft = _renamed(draft, r"head\.fc\.", "head.", "head.fc -> head")
    last = len(architecture(names)["layers"]) - 1
    if "norm.weight" in names or f"stages.{last}.norm.weight" not in names:
        return draft
    return _renamed(draft, rf"stages\.{last}\.norm\.", "norm.", f"stages.{last}.norm -> norm")


def _sum_fused_branches(draft: Translation) -> Translation:
    """Deep fusion before merging leaves two convolutions with biases, which are one convolution."""
    state = dict(draft.state_dict)
    for name in draft.state_dict:
        if not name.endswith(".lkb_origin.conv.bias"):
            continue
        block = name.removesuffix(".lkb_origin.conv.bias")
        weight, bias = state.pop(f"{block}.lkb_origin.conv.weight"), state.pop(name)
        if f"{block}.small_conv.conv.bias" in state:
            little = state.pop(f"{block}.small_conv.conv.weight")
            bias = bias + state.pop(f"{block}.small_conv.conv.bias")
            weight = weight + F.pad(little, [(weight.shape[-1] - little.shape[-1]) // 2] * 4)
        state |= {f"{block}.lkb_reparam.weight": weight, f"{block}.lkb_reparam.bias": bias}
    if state.keys() == draft.state_dict.keys():
        return draft
    words = "lkb_origin + small_conv -> lkb_reparam"
    return Translation(state, draft.prefix, (*draft.renamed, words), draft.ignored)


def _renamed(draft: Translation, pattern: str, new: str, words: str) -> Translation:
    if not any(re.match(pattern, name) for name in draft.state_dict):
        return draft
    names = {re.sub(rf"^{pattern}", new, n): v for n, v in draft.state_dict.items()}
    return Translation(names, draft.prefix, (*draft.renamed, words), draft.ignored)


def form_of(state_dict: Mapping[str, Tensor]) -> Form:
    """Form of a RepLKNet, from the names of its tensors."""
    if any(".lkb_origin." in name for name in state_dict):
        return "training"
    if "stem.0.bn.weight" in state_dict:
        return "merged"
    return "deep_fused" if any(".prelkb_bn." in name for name in state_dict) else "fused"


def architecture(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of ``RepLKNet`` that its weights show: all but the stem's stride.

    Raises:
        ValueError: The names or shapes are not those of a RepLKNet.
    """
    try:
        return _architecture(state_dict)
    except KeyError as error:
        raise ValueError(f"the RepLKNet is incomplete: {error.args[0]} is missing") from error


def _architecture(state: Mapping[str, Tensor]) -> dict[str, Any]:
    blocks: dict[int, int] = {}
    for name in state:
        if found := re.match(r"stages\.(\d+)\.blocks\.(\d+)\.", name):
            stage, block = map(int, found.groups())
            blocks[stage] = max(blocks.get(stage, 0), block)
    stages = range(len(blocks))
    large = "lkb_origin.conv" if form_of(state) == "training" else "lkb_reparam"
    first = "stages.0.blocks.0.large_kernel"
    small = state.get(f"{first}.small_conv.conv.weight")
    width = state[_ANCHOR].shape[0]
    kernels = tuple(
        state[f"stages.{s}.blocks.0.large_kernel.{large}.weight"].shape[-1] for s in stages
    )
    return {
        "kernels": kernels,
        "layers": tuple((blocks[s] + 1) // 2 for s in stages),
        "channels": tuple(state[f"stages.{s}.blocks.0.pw1.conv.weight"].shape[1] for s in stages),
        "small_kernel": None if small is None else small.shape[-1],
        "dw_ratio": state["stages.0.blocks.0.pw1.conv.weight"].shape[0] / width,
        "ffn_ratio": state["stages.0.blocks.1.pw1.conv.weight"].shape[0] / width,
        "in_chans": state[_ANCHOR].shape[1],
        "norm_intermediate_features": "stages.0.norm.weight" in state,
        "num_classes": state["head.weight"].shape[0] if "head.weight" in state else 0,
    }
