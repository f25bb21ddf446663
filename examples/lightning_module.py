"""A LightningModule around the model: Lightning runs the loop, and brings its loggers, strategies and callbacks."""

import lightning
import torch
from _clips import CONFIG, TOKENS, Clips, arguments, finish
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import xclip_fast

parser = arguments(__doc__)
parser.add_argument("--precision", default="32-true", help="32-true, bf16-mixed or 16-mixed")


class VideoClassifier(lightning.LightningModule):
    """X-CLIP and its class texts, (K, L) token ids."""

    def __init__(self, config: xclip_fast.XCLIPConfig, tokens: torch.Tensor, lr: float) -> None:
        super().__init__()
        self.model = xclip_fast.create_model(config)
        # a buffer goes where the module goes
        self.register_buffer("tokens", tokens)
        self.lr = lr
        self.losses: list[float] = []

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
        videos, labels = batch
        loss = cross_entropy(self.model(videos, self.tokens), labels, label_smoothing=0.1)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), self.lr, betas=(0.9, 0.98), weight_decay=0.001)


def main() -> None:
    options = parser.parse_args()
    lightning.seed_everything(0, verbose=False)
    classifier = VideoClassifier(CONFIG, TOKENS, options.lr)
    # Lightning gives back the mode that each module came with, and create_model's is evaluation
    classifier.train()
    trainer = lightning.Trainer(
        max_steps=options.steps,
        accelerator="gpu" if options.device.startswith("cuda") else options.device,
        devices=1,
        precision=options.precision,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(classifier, DataLoader(Clips(), options.batch, shuffle=True, drop_last=True))
    finish(classifier.losses)


if __name__ == "__main__":
    main()
