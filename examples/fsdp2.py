"""FSDP2: every process holds a part of each weight, of its gradient, and of what the optimizer knows of it.

One process by itself is a group of one; ``torchrun --nproc-per-node 2 examples/fsdp2.py`` starts two.
"""

import os
import tempfile
from pathlib import Path

import torch
from _clips import CONFIG, TOKENS, Clips, arguments, finish
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler

import xclip_fast
from xclip_fast.parallel import fully_shard

parser = arguments(__doc__.partition("\n")[0])
parser.add_argument("--out", type=Path, help="a .safetensors file for the whole weights")


def main() -> None:
    options = parser.parse_args()
    alone = {} if "RANK" in os.environ else {"store": distributed.HashStore(), "rank": 0, "world_size": 1}
    on_gpu = options.device.startswith("cuda")
    distributed.init_process_group("nccl" if on_gpu else "gloo", **alone)
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if on_gpu else "cpu")
    # the same weights in each process, which then keeps its part
    model = xclip_fast.create_model(CONFIG, seed=0).to(device).train()
    fully_shard(model, mesh=init_device_mesh(device.type, (ranks,)))
    # after sharding: an optimizer made before would hold the whole weights
    optimizer = torch.optim.AdamW(model.parameters(), options.lr, betas=(0.9, 0.98), weight_decay=0.001)
    tokens = TOKENS.to(device)
    sampler = DistributedSampler(Clips(), shuffle=True)
    loader = DataLoader(Clips(), options.batch // ranks, sampler=sampler, drop_last=True)
    losses: list[float] = []
    epoch = 0
    while len(losses) < options.steps:
        sampler.set_epoch(epoch)
        epoch += 1
        for videos, labels in loader:
            loss = cross_entropy(model(videos.to(device), tokens), labels.to(device), label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            mean = loss.detach().clone()
            distributed.all_reduce(mean)
            losses.append(mean.item() / ranks)

    # all processes take part in it, and the first one has the whole weights then
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    video = Clips()[0][0][None]
    with torch.no_grad():
        expected = model.eval()(video.to(device), tokens).cpu()
    if rank == 0:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            path = options.out or Path(folder) / "whole.safetensors"
            whole = xclip_fast.create_model(CONFIG)
            whole.load_state_dict(state)
            xclip_fast.save_model(whole, path)
            torch.testing.assert_close(xclip_fast.load_model(path)(video, TOKENS), expected, rtol=1e-4, atol=1e-4)
    distributed.destroy_process_group()
    if rank == 0:
        finish(losses[: options.steps])


if __name__ == "__main__":
    main()
