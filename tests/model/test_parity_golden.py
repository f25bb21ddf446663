"""The reference equals the official code: golden outputs at random weights, in float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from golden import Golden
from numerics import PUBLISHED, assert_within, relative_error
from torch import Tensor

from xclip_fast.reference import XCLIP


@pytest.fixture(scope="module")
def run(golden: Golden) -> dict[str, Tensor]:
    """What the reference computes for every output of the golden file, in the official layout."""
    model = golden.model()
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[object, object, Tensor], None]:
        def hook(_module: object, _inputs: object, tokens: Tensor) -> None:
            found[name] = tokens.flatten(0, 1).transpose(0, 1)

        return hook

    for i, block in enumerate(model.visual.transformer.resblocks):
        block.register_forward_hook(keep(f"block{i}"))
    with torch.inference_mode():
        features = model.encode_video(golden.video)
        found["video_features"] = features.video
        found["mean_patch_features"] = features.patches
        found["patch_features"] = patch_features(model, golden.video)
        found["text_features"] = model.encode_text(golden.tokens)
        found["logits"] = model(golden.video, golden.tokens)
    return found


def patch_features(model: XCLIP, video: Tensor) -> Tensor:
    """The projected patch tokens (B, T, N, E) before the mean over frames, which the public surface does not give."""
    _, patches = model.visual(model.normalise(video))
    return model.prompts_visual_ln(patches) @ model.prompts_visual_proj


def test_parity_every_output(golden: Golden, run: dict[str, Tensor]) -> None:
    for name, truth in golden.outputs.items():
        assert_within(run[name], truth, PUBLISHED, what=f"official {name}")


def test_parity_mean_of_patch_features(golden: Golden, run: dict[str, Tensor]) -> None:
    truth = golden.outputs["patch_features"].mean(dim=1)
    assert_within(run["mean_patch_features"], truth, PUBLISHED, what="official patch_features, mean over T")


def test_golden_files_hold_every_output(golden: Golden) -> None:
    blocks = {f"block{i}" for i in range(golden.config.vision_layers)}
    assert set(golden.outputs) == blocks | {"video_features", "patch_features", "text_features", "logits"}


def test_golden_outputs_notice_one_changed_weight(golden: Golden) -> None:
    model = golden.model()
    with torch.no_grad():
        model.visual.transformer.resblocks[0].message_ln.weight[3] += 0.1
        logits = model(golden.video, golden.tokens)
    assert relative_error(logits, golden.outputs["logits"]) > 2 * PUBLISHED


def test_state_dict_has_the_official_names_and_shapes(golden: Golden) -> None:
    ours = {name: tuple(value.shape) for name, value in XCLIP(golden.config).state_dict().items()}
    assert ours == {name: tuple(value.shape) for name, value in golden.weights.items()}
