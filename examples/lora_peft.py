"""LoRA by peft: the towers are frozen but for low-rank adapters, what X-CLIP adds to CLIP is trained whole."""

import tempfile
from pathlib import Path

import peft
import torch
from _clips import CONFIG, TOKENS, Clips, arguments, finish
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import xclip_fast

parser = arguments(__doc__)
parser.add_argument("--rank", type=int, default=8, help="of the adapters")
parser.add_argument("--out", type=Path, help="a .safetensors file for the merged weights")


def main() -> None:
    options = parser.parse_args()
    torch.manual_seed(0)
    # of the towers each MLP and the output of each attention: its packed input projection is no module of its own
    adapters = peft.LoraConfig(
        r=options.rank,
        target_modules=r".*resblocks.*\.(c_fc|c_proj|out_proj|message_fc)",
        exclude_modules=r"mit\..*",
        modules_to_save=["mit", "prompts_generator"],
    )
    # or load_model("ViT-B-32-quickgelu/openai"): adapters make sense where something is pretrained
    model = peft.get_peft_model(xclip_fast.create_model(CONFIG), adapters).to(options.device).train()
    model.print_trainable_parameters()
    tokens = TOKENS.to(options.device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, options.lr)
    loader = DataLoader(Clips(), options.batch, shuffle=True, drop_last=True)
    losses: list[float] = []
    while len(losses) < options.steps:
        for videos, labels in loader:
            loss = cross_entropy(model(videos.to(options.device), tokens), labels.to(options.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())

    # merged, it is a plain model again: load_model reads it, the engine packs it, every command takes it
    merged = model.merge_and_unload().eval()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        path = options.out or Path(folder) / "merged.safetensors"
        xclip_fast.save_model(merged, path)
        loaded = xclip_fast.load_model(path).to(options.device)
        video = Clips()[0][0][None].to(options.device)
        torch.testing.assert_close(loaded(video, tokens), merged(video, tokens))
    finish(losses[: options.steps])


if __name__ == "__main__":
    main()
