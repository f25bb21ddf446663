"""The same loop on accelerate: one process or many, mixed precision, accumulated gradients, no line for a device."""

import torch
from _clips import CONFIG, TOKENS, Clips, arguments, finish
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import xclip_fast

parser = arguments(__doc__)
parser.add_argument("--mixed-precision", default="no", help="no, bf16 or fp16")
parser.add_argument("--accumulate", type=int, default=2, help="batches whose gradients are added up for one step")


def main() -> None:
    options = parser.parse_args()
    set_seed(0)
    accelerator = Accelerator(
        cpu=options.device == "cpu",
        mixed_precision=options.mixed_precision,
        gradient_accumulation_steps=options.accumulate,
    )
    model = xclip_fast.create_model(CONFIG).train()
    optimizer = torch.optim.AdamW(model.parameters(), options.lr, betas=(0.9, 0.98), weight_decay=0.001)
    loader = DataLoader(Clips(), options.batch // options.accumulate, shuffle=True, drop_last=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps * accelerator.num_processes)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    tokens = TOKENS.to(accelerator.device)
    losses: list[float] = []
    parts: list[torch.Tensor] = []
    while len(losses) < options.steps:
        for videos, labels in loader:
            with accelerator.accumulate(model):
                # call what prepare gave back: it synchronises gradients, and casts as mixed_precision says
                loss = cross_entropy(model(videos, tokens), labels, label_smoothing=0.1)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            parts.append(accelerator.gather(loss.detach()).mean())
            if accelerator.sync_gradients and len(losses) < options.steps:
                losses.append(torch.stack(parts).mean().item())
                parts.clear()
    if accelerator.is_main_process:
        finish(losses)
    accelerator.end_training()


if __name__ == "__main__":
    main()
