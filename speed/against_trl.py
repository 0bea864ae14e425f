"""One update of GRPO as TRL's GRPOTrainer does it and as grpo.py does it, in turn (row 5).

    pip install trl && python -m speed.benchmark --rows 5

The work is what both can do: the toy's base, single-shot (T = 0, no feedback picture), 8 prompts
with 6 completions each of at most 80 tokens at temperature 1, LoRA of rank 32, a reference, one
step of AdamW, from the same reward. Each goes its own way to it. TRL writes with `generate()` and
hands image and text to the model anew in each pass; its reference is the model without LoRA, ours
a second adapter. Its gradient is of all 48 completions at once, ours of six at a time, as in
the toy preset. TRL ends a completion at the end of the turn, ours at the box, a token earlier.
"""

import statistics
import tempfile
from pathlib import Path
from types import SimpleNamespace

from common import SINGLE_SHOT, advantages, parse_box, reward
from speed.measure import now
from speed.ours import update
from support.data.samples import load_image
from support.model.adapters import lora_config, lora_size, policy_and_reference
from support.model.decoding import play
from support.model.loading import load_vlm
from support.running.flags import EMBEDDED, model_path
from support.running.presets import PRESETS
from toy.world import make_samples

import torch
from transformers import PrinterCallback, Qwen3VLProcessor, TrainerCallback

PROMPTS = 8
GROUP_SIZE = 6
MOST_TOKENS = 80
PRESET = {name: setting.toy for name, setting in (PRESETS["all"] | PRESETS["grpo"]).items()}


def our_step(vlm, optimizer, images, samples, seed):
    """One update as in grpo.py. Returns the mean number of tokens of a completion."""
    rows = play(
        vlm,
        images,
        [sample["expression"] for sample in samples],
        0,
        max_tokens=MOST_TOKENS,
        loop=SINGLE_SHOT,
        group_size=GROUP_SIZE,
        temperatures=(1.0, 1.0),
        seeds=[seed * PROMPTS + i for i in range(PROMPTS)],
    )
    owners = [sample for sample in samples for _ in range(GROUP_SIZE)]
    rewards = torch.tensor([reward(row.boxes, sample) for row, sample in zip(rows, owners)])
    advantage = advantages(rewards.view(PROMPTS, GROUP_SIZE)).flatten()  # [P * N]
    update(vlm, rows, [], advantage.tolist(), batch_size=PRESET["batch_size"])
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    return statistics.mean(len(row.target) for row in rows)


def trl_reward(completions, sample, **_):
    """`reward` in the form that TRL asks for: lists, one entry for each completion."""
    pairs = zip(completions, sample)
    return [reward([parse_box(written[0]["content"])], truth) for written, truth in pairs]


class WithoutVideos(Qwen3VLProcessor):
    """An image processor and a tokenizer in one, as TRL wants them."""

    def check_argument_for_proper_class(self, name, argument):
        """The processor of videos needs torchvision; None stands for it."""


def trl_trainer(vlm, images, samples, updates, folder, callback):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    rows = []
    for sample, image in zip(samples, images):
        prompt = SINGLE_SHOT.prompt.format(text=sample["expression"])
        messages = [{"role": "user", "content": prompt}]
        rows.append({"prompt": messages, "image": image, "sample": sample})
    config = GRPOConfig(
        output_dir=folder,
        bf16=False,
        per_device_train_batch_size=PROMPTS * GROUP_SIZE,
        num_generations=GROUP_SIZE,
        max_completion_length=MOST_TOKENS,
        beta=PRESET["beta"],
        learning_rate=PRESET["lr"],
        gradient_checkpointing=False,
        max_steps=updates,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    vlm.tokenizer.padding_side = "left"
    template = vlm.tokenizer.chat_template
    trainer = GRPOTrainer(
        model=vlm.base,
        reward_funcs=trl_reward,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=WithoutVideos(vlm.image_processor, vlm.tokenizer, None, template),
        peft_config=lora_config(*lora_size("toy")),
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def against_trl(work, args):
    """Row 5, on the toy's base, whatever the other rows are measured on: ours runs when TRL's step
    has ended. The first turn of both is not timed."""
    try:
        import trl
    except ImportError:
        print("5. GRPO step against TRL: left out, it is not installed (pip install trl)")
        return
    vlm, other = (load_vlm(SimpleNamespace(**PRESET), model_path(EMBEDDED)) for _ in range(2))
    policy_and_reference(vlm, None, lora_size("toy"))
    parameters = [p for p in vlm.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=PRESET["lr"], weight_decay=0.0)
    theirs, ours, our_tokens = [], [], []

    class Turns(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = now()

        def on_step_end(self, *_, **__):
            theirs.append(now() - self.start)
            start = now()
            our_tokens.append(our_step(vlm, optimizer, images, samples, len(ours)))
            ours.append(now() - start)

    with tempfile.TemporaryDirectory() as folder:
        samples = make_samples(folder, -(-PROMPTS // 3), 0)[:PROMPTS]
        images = [load_image(sample, Path(folder)) for sample in samples]
        trainer = trl_trainer(other, images, samples, args.repeats + 1, folder, Turns())
        trainer.train()
    their_tokens = [row["completions/mean_length"] for row in trainer.state.log_history[:-1]]
    seconds = [statistics.median(times[1:]) for times in (theirs, ours)]
    ratios = sorted(a / b for a, b in zip(theirs[1:], ours[1:]))
    print(
        f"5. GRPO step on the toy, TRL {trl.__version__}: {seconds[0]:.2f} s, ours {seconds[1]:.2f}"
        f" s, {statistics.median(ratios):.2f} times faster ({ratios[0]:.2f} to {ratios[-1]:.2f}); "
        f"tokens a completion {statistics.mean(their_tokens[1:]):.1f}, "
        f"{statistics.mean(our_tokens[1:]):.1f}"
    )
