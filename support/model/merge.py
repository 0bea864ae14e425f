"""The base model and the best adapter of a run as one plain checkpoint, for other engines.

    python -m support.model.merge --folder merged

Takes the GRPO adapter of the run, else its SFT adapter. The sum is taken in float32 and stored in
--dtype, so bfloat16 rounds the update with the weights. An adapter that was trained on 4-bit
weights is added to the weights in full, which are not quite those it was trained on. A tokenizer
without a class of its own, such as the toy's, is saved as one that takes transformers 5 to load.
"""

from support.model.adapters import add_adapter
from support.model.checkpoints import best_adapter
from support.model.loading import load_vlm
from support.running.errors import stop
from support.running.files import writing
from support.running.flags import Flag, command, flags

import torch

if __name__ == "__main__":
    args = flags("merge", __doc__, folder=Flag("where the checkpoint goes", kind="new folder"))
    if not args.folder:
        stop("give the folder to write: --folder merged")
    adapter = best_adapter(args.out)
    if not adapter:
        stop(f"{args.out} has no adapter; first run: {command(args, 'python sft.py')}")
    dtype = getattr(torch, args.dtype)
    args.dtype, args.quantize = "float32", "none"
    vlm = load_vlm(args)
    add_adapter(vlm, adapter, "policy")
    with writing(args.folder):
        vlm.model.merge_and_unload().to(dtype).save_pretrained(args.folder)
        vlm.tokenizer.save_pretrained(args.folder)
        vlm.image_processor.save_pretrained(args.folder)
    print(f"{adapter} merged into {args.model}: {args.folder}")
