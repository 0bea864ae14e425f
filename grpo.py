"""Phase 2: GRPO on whole trajectories (Sections 3.3 and 3.4).

    python sft.py && python grpo.py          trains SFT + GRPO + IVT, then the single-step control of Table 1
    python grpo.py --steps 0                 the single-step control alone (likewise --steps 2)
    python grpo.py --init base --steps 2     GRPO without SFT (Section 4.2, "SFT is the key enabler")
    python grpo.py --reward six --steps 2    the composite reward that Section 3.4 advises against

Each update: 8 prompts, N = 6 trajectories each, sampled at temperature 1.0 (step 0) and 0.7 (refinement); the reward is
the final box's IoU + 0.1 * share of valid steps; the advantage is the reward against its group; one gradient step. The
reference of the KL term is a second, frozen copy of the adapter that training started from, never the bare base model.

Where the paper is silent: log-probabilities are the model's own, at temperature 1, in the loss; AdamW at a constant rate,
gradients clipped to norm 1; validation is greedy. "Gradient accumulation over 8 steps" is read as 8 prompts per update.

Reads data/{train,val}.jsonl, sft/. Writes grpo/ (grpo_single/ for --steps 0, base_grpo/ for --init base, grpo_six/ for --reward
six), a PEFT adapter, the best by validation reward; log/<name>.jsonl and <name>.checkpoint under --out.
"""

import math
import random
import time

import torch
from tqdm import tqdm

from common import (IVT_PROMPT, PRESETS, advantages, box_iou, build_trajectory, encode_images, grpo_loss, reward, rollout,
                    six_component_reward, trajectory_logprobs)
from runtime import (RANK, Log, adapter_state, add_adapter, begin, catch_interrupts, divides, flags, gather, interrupted, leave_if_interrupted,
                     load_checkpoint, load_image, load_vlm, memory_for, minutes, new_adapter, probe, read_samples, restore_adapter,
                     save_adapter, save_checkpoint, seed_all, share, stop, sum_gradients, unhealthy)

args = flags("grpo", __doc__, init=("sft", "start from the SFT adapter or from the base model", ("sft", "base")))
divides(args.grad_accum, "--grad-accum")
data = args.out / "data"

# ------------------------------------------------------------------------------------------------------------------
# Data
# ------------------------------------------------------------------------------------------------------------------
train = read_samples(data / "train.jsonl", f"python make_data.py --preset {args.preset}", args.skip_bad)
val = read_samples(data / "val.jsonl", f"python make_data.py --preset {args.preset}", args.skip_bad)[:args.val_prompts]
if args.init == "sft" and not (args.out / "sft/adapter_model.safetensors").exists():
    stop(f"{args.out / 'sft'} is missing; first run: python sft.py --preset {args.preset}")

# What is watched, as means over the last 10 updates: the healthy range (rules of thumb) and what to try outside it
HEALTHY = {"kl": (0, 0.5, "the policy runs from its reference; lower --lr or raise --beta"),
           "entropy": (0.01, 3, "low: groups stop differing, raise --entropy; high: a collapse on the way, lower --lr"),
           "no_signal": (0, 0.7, "most groups have equal rewards and teach nothing; raise --temperature or --group-size"),
           "valid": (0.9, 1, "boxes are lost; lower --lr, raise --max-tokens if steps end unfinished")}

score = reward if args.reward == "simple" else six_component_reward

for steps in map(int, args.steps.split()):  # T of each policy to train
    name = ("" if args.init == "sft" else "base_") + ("grpo" if steps else "grpo_single") + ("" if args.reward == "simple" else "_six")
    start = time.time()
    seed_all(args.seed)
    begin(args, name, data / "train.jsonl", data / "val.jsonl", *[args.out / "sft/adapter_model.safetensors"] * (args.init == "sft"),
          steps=steps, ignore=("batch_size", "prompts_at_once"))
    checkpoint = args.out / f"{name}.checkpoint"
    state = load_checkpoint(checkpoint, args.restart)
    if state and state["finished"]:
        print(f"{args.out / name} is finished; --restart begins again")
        continue

    # --------------------------------------------------------------------------------------------------------------
    # Model and optimizer: two adapters that begin as the same one, the policy (trained) and the reference (frozen)
    # --------------------------------------------------------------------------------------------------------------
    vlm = optimizer = parameters = None  # the policy before this one makes room
    vlm = load_vlm(args)
    if args.init == "sft":
        add_adapter(vlm, args.out / "sft", "policy")
        add_adapter(vlm, args.out / "sft", "reference")
    else:  # a new adapter changes nothing until it is trained: policy and reference begin as the base model
        for adapter in ("policy", "reference"):
            new_adapter(vlm, *(PRESETS["sft"][key][args.preset == "toy"] for key in ("lora_rank", "lora_alpha")), adapter)
    vlm.model.set_adapter("policy")  # in PEFT the active adapter is also the one that takes gradients
    parameters = [p for p in vlm.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)

    def play(samples, group_size=1, temperatures=(0.0, 0.0), first=0):
        """Trajectories of the current policy, `group_size` for each sample, a few prompts at a time. first: the number of
        the first sample in the run, which seeds what is sampled for it."""
        out = []
        for i in range(0, len(samples), args.prompts_at_once):
            part = samples[i:i + args.prompts_at_once]
            out += rollout(vlm, [load_image(s, data) for s in part], [s["expression"] for s in part], steps,
                           args.max_tokens, group_size=group_size, temperatures=temperatures,
                           seeds=[args.seed * 1_000_003 + first + i + j for j in range(len(part))])
        return out

    def facts(played, samples, score):
        """Of the trajectories of all processes: rewards [P * N], valid boxes, tokens, and the mean IoU of each step. The reward
        does not see the IoU of the steps, the log does (Section 3.4, "Advantage scoring")."""
        rows = gather([(score(t.boxes, s), [box_iou(box, s) for box in t.boxes], sum(box is not None for box in t.boxes), len(t.target))
                       for t, s in zip(played, samples)])
        rewards, ious, valid, tokens = zip(*rows)
        return torch.tensor(rewards), sum(valid), sum(tokens), [round(sum(v) / len(rows), 4) for v in zip(*ious)]

    # --------------------------------------------------------------------------------------------------------------
    # Resume
    # --------------------------------------------------------------------------------------------------------------
    first_update, best, logged = 0, -1.0, 0
    if state:
        restore_adapter(vlm.model, state["adapter"], "policy")
        optimizer.load_state_dict(state["optimizer"])
        first_update, best, logged = state["update"], state["best"], state["logged"]
        print(f"going on after update {first_update}")
    log = Log(args.out / f"log/{name}.jsonl", keep=logged)

    # --------------------------------------------------------------------------------------------------------------
    # Training. Validation comes before updates 0, val_every, ... and after the last one.
    # --------------------------------------------------------------------------------------------------------------
    def save(update, finished=False):
        save_checkpoint(checkpoint, adapter=adapter_state(vlm.model, "policy"), optimizer=optimizer.state_dict(),
                        update=update, best=best, logged=log.rows, finished=finished)

    advice = "--max-pixels, --batch-size, --prompts-at-once or --max-tokens"
    largest = max(train, key=lambda s: s["width"] * s["height"])
    text = vlm.tokenizer.decode([vlm.encode(" the")[0]] * args.max_tokens)  # a step of the greatest length
    with memory_for([largest], advice):
        image = encode_images(vlm, [load_image(largest, data)]) * (steps + 1)
        longest = build_trajectory(vlm, IVT_PROMPT.format(expression=largest["expression"]), image, [text] * (steps + 1))
    probe(vlm, [longest] * args.batch_size, [largest], advice)
    catch_interrupts()
    val_reward, recent, warned = best, [], set()
    bar = tqdm(total=args.updates, initial=first_update, desc=name, unit="update", disable=RANK > 0)
    for update in range(first_update, args.updates + 1):
        if update % args.val_every == 0 or update == args.updates:
            # Validation: the mean greedy reward; the best adapter so far is the result of the run
            rewards, _, _, ious = facts(play(share(val)), share(val), reward)
            val_reward = rewards.mean().item()
            log.write(update=update, val_reward=val_reward, val_iou=ious)
            if val_reward > best:
                best = val_reward
                save_adapter(vlm, args.out / name, "policy")
            if update == args.updates:
                break

        # Rollout: P prompts, N trajectories each
        samples = []
        for i in range(update * args.grad_accum, (update + 1) * args.grad_accum):
            order = random.Random(f"{args.seed} {i // len(train)}").sample(range(len(train)), len(train))
            samples.append(train[order[i % len(train)]])
        mine = share(samples)
        owner = [sample for sample in mine for _ in range(args.group_size)]
        with memory_for(mine, advice):
            played = play(mine, args.group_size, (args.temperature_first, args.temperature), update * args.grad_accum + RANK * len(mine))

        # Reward and advantage, of the trajectories of all processes
        rewards, valid, tokens, ious = facts(played, owner, score)
        rewards = rewards.view(-1, args.group_size)                                                         # [P, N]
        advantage = share(advantages(rewards).flatten().tolist())                                           # of each in `played`

        # Update
        sums = torch.zeros(4)
        for i in range(0, len(played), args.batch_size):
            batch = played[i:i + args.batch_size]
            with memory_for(owner[i:i + args.batch_size], advice):
                with torch.no_grad():
                    vlm.model.set_adapter("reference")
                    ref_logprob, _ = trajectory_logprobs(vlm, batch)                                        # [M]
                    vlm.model.set_adapter("policy")
                logprob, entropy = trajectory_logprobs(vlm, batch)                                          # [M], [M]
                of_token = torch.tensor([a for a, t in zip(advantage[i:], batch) for _ in t.target])        # [M]
                terms = grpo_loss(logprob, ref_logprob, of_token.to(logprob), entropy, args.beta, args.entropy, args.kl)
                (terms[0] / tokens).backward()
            sums += torch.tensor([term.item() for term in terms]) / tokens
        sum_gradients(parameters)
        sums = torch.tensor(gather([sums.tolist()])).sum(0)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
        loss, policy, distance, entropy = sums.tolist()
        if not math.isfinite(loss + norm):
            stop(f"update {update}: loss {loss}, gradient norm {norm}; samples {[s['id'] for s in samples]}; "
                 "lower --lr")
        optimizer.step()
        optimizer.zero_grad()

        # Log
        row = dict(reward=rewards.mean().item(), reward_std=rewards.std(1, unbiased=False).mean().item(),
                   no_signal=(rewards.std(1) < 1e-6).float().mean().item(), iou=ious,
                   valid=valid / rewards.numel() / (steps + 1), loss=loss, policy=policy, kl=distance, entropy=entropy,
                   grad_norm=norm, tokens=tokens / rewards.numel())
        log.write(update=update + 1, **row)
        recent = recent[-9:] + [row]
        for sentence in unhealthy(recent, HEALTHY, warned):
            bar.write(sentence)
        bar.set_postfix(reward=f"{rewards.mean():.3f}", val=f"{val_reward:.3f}", kl=f"{distance:.3f}", refresh=False)
        bar.update()
        if (update + 1) % args.save_every == 0 or interrupted():
            save(update + 1)
            leave_if_interrupted()
    bar.close()
    save(args.updates, finished=True)
    print(f"best validation reward {best:.3f}; adapter in {args.out / name}, {minutes(start)}")
print("next: python evaluate.py")
