"""A training loop in plain PyTorch: everything in sight, one process, one device."""

import torch
from _clips import CONFIG, TOKENS, Clips, arguments, finish
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import xclip_fast

parser = arguments(__doc__)
parser.add_argument("--bfloat16", action="store_true", help="activations in bfloat16, weights in float32")
parser.add_argument("--checkpointing", action="store_true", help="keep the input of each block alone: less memory")
parser.add_argument(
    "--compile", action="store_true", help="one graph of forward pass and loss, and one of their gradient"
)


def main() -> None:
    options = parser.parse_args()
    torch.manual_seed(0)
    # or load_model("ViT-B-32-quickgelu/openai"), CLIP's towers, and a frozen text tower: see below
    model = xclip_fast.create_model(CONFIG).to(options.device).train()
    if options.checkpointing:
        model.gradient_checkpointing_enable()
    tokens = TOKENS.to(options.device)
    loader = DataLoader(Clips(), options.batch, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), options.lr, betas=(0.9, 0.98), weight_decay=0.001)

    def loss_of(videos: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        # bytes go in as they are. With a frozen text tower, encode the texts once, outside of the loop:
        # text = model.encode_text(tokens).detach(), and here model.logits(model.encode_video(videos), text)
        with torch.autocast(options.device, torch.bfloat16, enabled=options.bfloat16):
            logits = model(videos, tokens)
        # labels may be mixed, (B, K), just as well
        return cross_entropy(logits.float(), labels, label_smoothing=0.1)

    if options.compile:
        loss_of = torch.compile(loss_of, fullgraph=True)
    losses: list[float] = []
    while len(losses) < options.steps:
        for videos, labels in loader:
            loss = loss_of(videos.to(options.device), labels.to(options.device))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
    finish(losses[: options.steps])


if __name__ == "__main__":
    main()
