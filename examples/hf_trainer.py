"""Hugging Face's model and Trainer: ``optimize`` puts the fused ops under the modules, and all else stays theirs."""

import tempfile

import torch
from _clips import TOKENS, Clips, arguments, finish
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments, XCLIPConfig, XCLIPModel

import xclip_fast
from xclip_fast.reference.vision import normalise_pixels

TOWER = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
# nothing here is pretrained: larger first values learn sooner
TOWER |= {"initializer_factor": 3.0, "initializer_range": 0.2}
SIZES = {
    "projection_dim": 64,
    "prompt_num_attention_heads": 2,
    "text_config": TOWER | {"vocab_size": 514, "eos_token_id": 513, "max_position_embeddings": 32},
    "vision_config": TOWER | {"image_size": 64, "patch_size": 16, "mit_hidden_size": 64, "mit_num_attention_heads": 2},
}


def collate(samples: list[tuple[torch.Tensor, int]]) -> dict[str, torch.Tensor]:
    """A batch as Hugging Face's model takes it: frames in float32, normalised."""
    videos = torch.stack([video for video, _ in samples])
    pixels = normalise_pixels(videos, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), torch.float32)
    return {"pixel_values": pixels, "labels": torch.tensor([label for _, label in samples])}


class VideoTrainer(Trainer):
    """The loss over class texts, where the model's own pairs each video with a text."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        output = model(**inputs, input_ids=TOKENS.to(labels.device))
        loss = cross_entropy(output.logits_per_video, labels, label_smoothing=0.1)
        return (loss, output) if return_outputs else loss


def main() -> None:
    options = arguments(__doc__).parse_args()
    torch.manual_seed(0)
    # or XCLIPModel.from_pretrained("microsoft/xclip-base-patch32")
    model = XCLIPModel(XCLIPConfig(**SIZES))
    print(xclip_fast.optimize(model))
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            learning_rate=options.lr,
            use_cpu=options.device == "cpu",
            logging_steps=1,
            save_strategy="no",
            lr_scheduler_type="constant",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = VideoTrainer(model, settings, data_collator=collate, train_dataset=Clips())
        trainer.train()
    # Hugging Face's classes again, with the trained weights: save_pretrained, push_to_hub
    xclip_fast.restore(model)
    finish([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


if __name__ == "__main__":
    main()
