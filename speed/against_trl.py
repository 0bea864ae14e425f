"""One update of GRPO as TRL's GRPOTrainer does it and as grpo.py does it, in turn (row 7).

    pip install trl && python -m speed.benchmark --rows 7

The work is what both can do: the toy's base, single-shot (T = 0, no feedback picture), 8 prompts
with 6 completions each of at most 80 tokens at temperature 1, LoRA of rank 32, a reference, one
step of AdamW, from the same reward. Each goes its own way to it. TRL writes with `generate()` and
hands image and text to the model anew in each pass; its reference is the model without LoRA, ours
a second adapter. Its gradient is of all 48 completions at once, ours of six at a time, as in
the toy preset. TRL ends a completion at the end of the turn, ours at the box, a token earlier.
"""

import tempfile

from common import SINGLE_SHOT, advantages, parse_box, reward
from speed.measure import now
from support.model.adapters import lora_config, lora_size
from support.model.decoding import play
from support.model.loading import quiet
from support.running.presets import PRESETS

import torch

PROMPTS = 8
GROUP_SIZE = 6
MOST_TOKENS = 80
LEARNING_RATE = PRESETS["grpo"]["lr"].toy
BETA = PRESETS["grpo"]["beta"].toy


def our_step(vlm, optimizer, images, samples, seed, update):
    """One update as in grpo.py, whose losses `update` takes. Returns the tokens per completion."""
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
    update(vlm, rows, advantage.tolist(), PRESETS["grpo"]["batch_size"].toy)
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    return sum(len(row.target) for row in rows) / len(rows)


def trl_reward(completions, bbox, width, height, **_):
    """`reward` in the form that TRL asks for: lists, one entry for each completion."""
    rewards = []
    for completion, *truth in zip(completions, bbox, width, height):
        sample = dict(zip(("bbox", "width", "height"), truth))
        rewards.append(reward([parse_box(completion[0]["content"])], sample))
    return rewards


def processor_of(vlm):
    """The image processor and the tokenizer in one, as TRL wants them."""
    from transformers import Qwen3VLProcessor

    class WithoutVideos(Qwen3VLProcessor):
        def check_argument_for_proper_class(self, name, argument):
            """Its video processor needs torchvision; None stands for it."""

    vlm.tokenizer.padding_side = "left"
    return WithoutVideos(
        vlm.image_processor, vlm.tokenizer, None, chat_template=vlm.tokenizer.chat_template
    )


def compare(vlm, other, images, samples, repeats, update):
    """(TRL, ours): the seconds of each of `repeats` updates; and each one's tokens per completion.

    vlm: ours, with a policy and a reference; other: the same base, without LoRA, for TRL. They take
    turns: ours runs when TRL's step has ended. The first turn of both is not timed.
    """
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    parameters = [p for p in vlm.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    theirs = []
    ours = []
    our_tokens = []

    class Turns(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = now()

        def on_step_end(self, *_, **__):
            theirs.append(now() - self.start)
            start = now()
            our_tokens.append(our_step(vlm, optimizer, images, samples, len(ours), update))
            ours.append(now() - start)

    rows = []
    for sample, image in zip(samples, images):
        prompt = SINGLE_SHOT.prompt.format(text=sample["expression"])
        truth = {key: sample[key] for key in ("bbox", "width", "height")}
        rows.append({"prompt": [{"role": "user", "content": prompt}], "image": image, **truth})
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            per_device_train_batch_size=PROMPTS * GROUP_SIZE,
            num_generations=GROUP_SIZE,
            max_completion_length=MOST_TOKENS,
            temperature=1.0,
            beta=BETA,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            gradient_checkpointing=False,
            max_steps=repeats + 1,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=other.base,
            reward_funcs=trl_reward,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=processor_of(other),
            peft_config=lora_config(*lora_size("toy")),
            callbacks=[Turns()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    logged = [row["completions/mean_length"] for row in trainer.state.log_history[:-1]]
    tokens = (sum(logged[1:]) / repeats, sum(our_tokens[1:]) / repeats)
    return theirs[1:], ours[1:], tokens
