"""X-CLIP as a whole (paper, section 3.1): videos and class texts to logits."""

from __future__ import annotations

from math import log
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from xclip_fast.config import XCLIPConfig
from xclip_fast.reference.mit import MultiframeIntegration
from xclip_fast.reference.prompts import VideoPrompts
from xclip_fast.reference.transformer import TextTransformer
from xclip_fast.reference.vision import VisionTower, normalise_pixels


class VideoFeatures(NamedTuple):
    """What ``encode_video`` returns.

    Attributes:
        video: (B, E), one feature per video, not normalised.
        patches: (B, N, E), the projected patch tokens, averaged over the frames.

    Example:
        >>> import torch, xclip_fast
        >>> config = xclip_fast.XCLIPConfig(image_size=32, vision_width=64, text_width=64, vocab_size=514)
        >>> model = xclip_fast.reference.XCLIP(config).eval()
        >>> video, patches = model.encode_video(torch.zeros(1, 8, 32, 32, 3, dtype=torch.uint8))
        >>> video.shape, patches.shape
        (torch.Size([1, 512]), torch.Size([1, 1, 512]))
    """

    video: Tensor
    patches: Tensor


class XCLIP(nn.Module):
    """X-CLIP with random weights; ``xclip_fast.load_model`` fills them from a checkpoint.

    Args:
        config: sizes; the state dict has the names and shapes of the official checkpoints of those sizes.

    Example:
        >>> import torch, xclip_fast
        >>> config = xclip_fast.XCLIPConfig(image_size=32, vision_width=64, text_width=64, vocab_size=514)
        >>> oracle, fast = xclip_fast.reference.XCLIP(config).eval(), xclip_fast.create_model(config)
        >>> _ = fast.load_state_dict(oracle.state_dict())
        >>> inputs = torch.randn(1, 8, 3, 32, 32), torch.tensor([[512, 97, 513]])
        >>> torch.allclose(oracle(*inputs), fast(*inputs), atol=1e-4)
        True
    """

    # what a faster model puts in their place
    vision_tower: type[VisionTower] = VisionTower
    text_transformer: type[TextTransformer] = TextTransformer
    integration: type[MultiframeIntegration] = MultiframeIntegration
    prompts: type[VideoPrompts] = VideoPrompts

    def __init__(self, config: XCLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = self.vision_tower(
            config.vision_width,
            config.patch_size,
            config.image_size,
            config.vision_layers,
            config.vision_heads,
            config.vision_mlp_width,
            config.embed_dim,
            config.activation,
        )
        self.transformer = self.text_transformer(
            config.text_width, config.text_layers, config.text_heads, config.activation
        )
        self.token_embedding = nn.Embedding(config.vocab_size, config.text_width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, config.text_width))
        self.ln_final = nn.LayerNorm(config.text_width)
        self.text_projection = nn.Parameter(torch.empty(config.text_width, config.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(log(1 / 0.07)))
        self.mit = self.integration(config.embed_dim, config.embed_heads, config.mit_layers, config.frames)
        self.prompts_visual_ln = nn.LayerNorm(config.vision_width)
        self.prompts_visual_proj = nn.Parameter(torch.randn(config.vision_width, config.embed_dim))
        self.prompts_generator = self.prompts(
            config.embed_dim, config.embed_heads, config.prompt_layers, config.prompt_alpha
        )
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=config.text_width**-0.5)

    def encode_video(self, video: Tensor) -> VideoFeatures:
        """Features of videos.

        Args:
            video: uint8 (B, T, H, W, 3), or floating point (B, T, 3, H, W) already normalised. H and W are multiples
                of the patch size; T and the resolution may differ from the configuration (positions interpolated).

        Raises:
            ValueError: the video has another shape or dtype.
        """
        frame_features, patches = self.visual(self.normalise(video))
        patches = self.prompts_visual_ln(patches) @ self.prompts_visual_proj
        return VideoFeatures(self.mit(frame_features), patches.mean(dim=1))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Text features (K, E), not normalised, of token ids (K, L) with L up to the context length.

        The feature is the row at the largest token id, which is the end of text.

        Raises:
            ValueError: the tokens have another shape or dtype, or an id is not in the vocabulary.
        """
        check_tokens(tokens, self.config)
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        x = self.ln_final(self.transformer(x))
        ends = tokens.argmax(dim=-1)
        return x[torch.arange(tokens.shape[0], device=tokens.device), ends] @ self.text_projection

    def logits(self, features: VideoFeatures, text: Tensor) -> Tensor:
        """Scaled cosine similarities (B, K) of encoded videos and encoded texts (K, E)."""
        texts = self.prompts_generator(text.expand(features.video.shape[0], -1, -1), features.patches)
        cosine = torch.einsum("be,bke->bk", normalize(features.video, dim=-1), normalize(texts, dim=-1))
        return self.logit_scale.exp() * cosine

    def forward(self, video: Tensor, tokens: Tensor) -> Tensor:
        """Logits (B, K) of videos (see ``encode_video``) and class texts (K, L) (see ``encode_text``)."""
        return self.logits(self.encode_video(video), self.encode_text(tokens))

    def normalise(self, video: Tensor) -> Tensor:
        """Any accepted video as normalised (B, T, 3, H, W) in the dtype of the weights.

        Raises:
            ValueError: the video has another shape or dtype.
        """
        check_video(video)
        dtype = next(self.visual.parameters()).dtype
        if video.is_floating_point():
            return video.to(dtype)
        return normalise_pixels(video, self.config.pixel_mean, self.config.pixel_std, dtype)


def check_video(video: Tensor) -> None:
    """Refuse what ``encode_video`` cannot take.

    Raises:
        ValueError: the video has another shape or dtype.
    """
    if not isinstance(video, Tensor):
        raise ValueError(f"video must be a tensor, found {type(video).__name__}")
    if video.ndim != 5 or 0 in video.shape:
        raise ValueError(
            "video must be a non-empty uint8 (B, T, H, W, 3) or floating point (B, T, 3, H, W) tensor, "
            f"found shape {tuple(video.shape)}: group the frames of each video, one row per video"
        )
    channels = video.shape[-1] if video.dtype == torch.uint8 else video.shape[2]
    if channels != 3 or not (video.dtype == torch.uint8 or video.is_floating_point()):
        raise ValueError(
            "video must be uint8 (B, T, H, W, 3) or floating point (B, T, 3, H, W), "
            f"found {video.dtype} {tuple(video.shape)}"
        )


def check_tokens(tokens: Tensor, config: XCLIPConfig) -> None:
    """Refuse what ``encode_text`` cannot take.

    Raises:
        ValueError: the tokens have another shape or dtype, or an id is not in the vocabulary.
    """
    longest = config.context_length
    if not isinstance(tokens, Tensor):
        raise ValueError(f"tokens must be a tensor, found {type(tokens).__name__}")
    if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32) or not 1 <= tokens.shape[1] <= longest:
        raise ValueError(
            f"tokens must be integers of shape (K, L) with 1 <= L <= {longest}, "
            f"found {tokens.dtype} {tuple(tokens.shape)}"
        )
    # looking at values would halt a GPU, and break a compiled graph
    if tokens.device.type == "cpu" and tokens.numel() and not torch.compiler.is_compiling():
        low, high = tokens.aminmax()
        if low < 0 or high >= config.vocab_size:
            raise ValueError(
                f"token ids must lie in 0..{config.vocab_size - 1}, found {int(low)}..{int(high)}: "
                "use the tokenizer this model was trained with"
            )
