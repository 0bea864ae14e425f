"""Phase 1: questions with answers; boxes for the supervised start and the evaluation alone.

    python -m visrl.make_data                      the toy's world
    python -m visrl.make_data --data my.jsonl      your own samples
    python -m visrl.make_data --preset paper --viscot DIR     Visual CoT, the paper's data

Three sides, split by image. sft: samples with a box, for the supervised start (30k in the paper).
train: questions, for pairs; a "bbox" that the source has stays in the file, so that the pairs can
be judged by it afterwards, and nothing that trains reads it. test: held out.

The paper's data is Visual CoT: samples in the shares of Table 7, and the benchmark's eleven sets of
Table 2 as test samples, whose photos are in no other side. Departure: the toy preset has three
kinds of questions about marks that only a crop shows (visrl/sources.py).

Writes data/{sft,train,test}.jsonl and data/images/ under --out.
"""

import time
from collections import Counter

from support.data.foreign import OWN_FLAGS
from support.data.sources import begin_files
from support.running import errors, processes
from support.running.flags import Flag, command, flags
from visrl import sources

args = flags(
    "visrl.make_data",
    __doc__,
    **OWN_FLAGS,
    viscot=Flag("folder of Visual CoT (visrl/README.md)", kind="folder"),
)
start = time.time()
data = args.out / "data"
if args.data and args.viscot:
    errors.stop("--data is for samples of your own, --viscot for the paper's; give one of them")
if args.preset == "paper" and not (args.data or args.viscot):
    errors.stop(
        f"for samples of your own: --data FILE.jsonl; for the paper's: --viscot DIR. {sources.GET}"
    )
begin_files(args, data, sources.SIDES)

sides = sources.prepare(args, data)
for side, samples in sides.items():
    counts = Counter(sample["source"] for sample in samples)
    boxed = sum("bbox" in sample for sample in samples)
    print(f"{side}: {len(samples)}, {boxed} with a box; " + ", ".join(map(str, counts.items())))
    sample = samples[0]
    print(f"  {sample['question']!r} {sample['answer']!r}, {sample['image']}")
print(f"{processes.minutes(start)}; next: {command(args, 'python -m visrl.sft')}")
