"""One update of GRPO as TRL's GRPOTrainer does it, and as grpo.py does it.

    pip install trl
    python -m speed.against_trl

The work is what both can do: the toy's base, single-shot, the toy preset's prompts, completions at
temperature 1, LoRA, a reference, one step of AdamW, from the same reward. TRL writes with
`generate()` and hands image and text to the model anew in each pass; its reference is the model
without LoRA, ours a second adapter. Its gradient is of all completions at once, ours of six at a
time. It ends a completion at the end of the turn, ours at the box, a token earlier. Its own seconds
of a step leave out the optimizer's, ours do not.
"""

import tempfile
from statistics import mean, median

from common import SINGLE_SHOT, advantages, grpo_loss, parse_box, reward, trajectory_logprobs
from speed.benchmark import TURNS, now, scenes
from support.model.adapters import lora_config, lora_size, policy_and_reference, using
from support.model.decoding import play
from support.model.loading import load_vlm
from support.running.errors import stop
from support.running.flags import flags

import torch
from transformers import PrinterCallback, Qwen3VLProcessor


def our_steps(args, images, samples):
    """TURNS + 1 updates as in grpo.py -> (seconds, mean tokens of a completion) of each."""
    vlm = load_vlm(args)
    policy_and_reference(vlm, None, lora_size(args.preset))
    parameters = [p for p in vlm.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    texts = [sample["expression"] for sample in samples]
    owners = [sample for sample in samples for _ in range(args.group_size)]
    options = dict(max_tokens=args.max_tokens, group_size=args.group_size, temperatures=(1.0, 1.0))
    steps = []
    for turn in range(TURNS + 1):
        start = now()
        seeds = [turn * len(images) + i for i in range(len(images))]
        rows = play(vlm, images, texts, 0, loop=SINGLE_SHOT, seeds=seeds, **options)
        rewards = torch.tensor([reward(row.boxes, sample) for row, sample in zip(rows, owners)])
        advantage = advantages(rewards.view(len(images), -1)).flatten()  # [P * N]
        tokens = sum(len(row.target) for row in rows)
        for i in range(0, len(rows), args.batch_size):
            part = rows[i : i + args.batch_size]
            with torch.no_grad(), using(vlm, "reference"):
                reference = trajectory_logprobs(vlm, part).logprob  # [M]
            policy = trajectory_logprobs(vlm, part)
            own = advantage[i : i + args.batch_size].to(reference)[policy.row]  # [M]
            terms = policy.logprob, reference, own, policy.entropy
            loss, *_ = grpo_loss(*terms, beta=args.beta, entropy_weight=args.entropy)
            (loss / tokens).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps.append((now() - start, tokens / len(rows)))
    return steps


def trl_reward(completions, sample, **_):
    """`reward` in the form that TRL asks for: lists, one entry for each completion."""
    pairs = zip(completions, sample)
    return [reward([parse_box(written[0]["content"])], truth) for written, truth in pairs]


class WithoutVideos(Qwen3VLProcessor):
    """An image processor and a tokenizer in one, as TRL wants them."""

    def check_argument_for_proper_class(self, name, argument):
        """The processor of videos needs torchvision; None stands for it."""


def trl_steps(args, images, samples):
    """The same, as TRL does it."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    vlm = load_vlm(args)
    rows = []
    for sample, image in zip(samples, images):
        prompt = SINGLE_SHOT.prompt.format(text=sample["expression"])
        messages = [{"role": "user", "content": prompt}]
        rows.append({"prompt": messages, "image": image, "sample": sample})
    config = GRPOConfig(
        output_dir=tempfile.gettempdir(),
        bf16=False,
        per_device_train_batch_size=len(images) * args.group_size,
        num_generations=args.group_size,
        max_completion_length=args.max_tokens,
        beta=args.beta,
        learning_rate=args.lr,
        gradient_checkpointing=False,
        max_steps=TURNS + 1,
        logging_steps=1,
        save_strategy="no",
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
        peft_config=lora_config(*lora_size(args.preset)),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    logged = trainer.state.log_history[:-1]
    return [(row["step_time"], row["completions/mean_length"]) for row in logged]


def typical(steps):
    """(median seconds, mean tokens); the first update is not timed."""
    seconds, tokens = zip(*steps[1:])
    return median(seconds), mean(tokens)


def main(args):
    try:
        import trl
    except ImportError:
        stop("TRL is not installed; pip install trl")
    samples, images = scenes(args.grad_accum)
    theirs, their_tokens = typical(trl_steps(args, images, samples))
    ours, our_tokens = typical(our_steps(args, images, samples))
    print(
        f"GRPO step on the toy, TRL {trl.__version__}: {theirs:.2f} s, ours {ours:.2f} s, "
        f"{theirs / ours:.2f} times faster; tokens a completion {their_tokens:.1f}, "
        f"{our_tokens:.1f}"
    )


if __name__ == "__main__":
    main(flags("grpo", __doc__))
