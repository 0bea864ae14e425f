"""Every hyperparameter, in two columns. Each row is a flag of its phase: `python sft.py --lr 1e-4`.

The `paper` column is the paper's: Sections 3.3 and 4.1 of IVT to the digit; of VisRL, whose paper
names few numbers, those of its authors' public code. Where both are silent the help says "ours".
"""

from dataclasses import dataclass


@dataclass
class Setting:
    """One hyperparameter: its value in either preset, and what its flag takes."""

    paper: object
    toy: object
    help: str
    choices: tuple | None = None
    low: float = 1  # numbers outside low..high are refused
    high: float = 10**9


GUARD = Setting("off", "off", "refuse a box far from the one before; ours", ("off", "on"))
ENGINE = {  # of all phases that play the loop
    "engine": Setting("plain", "plain", "what decodes (speed/README.md); ours", ("plain", "vllm")),
    "vllm": Setting("", "", "further arguments of vllm.LLM, JSON; ours"),
    "max_tokens": Setting(160, 64, "per step"),
}
VISRL = {  # of all phases of the second paper
    "steps": None,  # a box and its crop, no T
    "feedback": None,
    "surroundings": None,
    "max_pixels": Setting(512**2, 96**2, "larger images and crops are reduced to this", low=1024),
    "crop": Setting(
        "box", "square", "square: with surroundings, as the toy's base learnt", ("box", "square")
    ),
}
VISRL_ENGINE = {**VISRL, **ENGINE, "max_tokens": Setting(128, 30, "per step; ours")}
TRAINING = {  # of SFT and DPO
    "warmup": Setting(0.1, 0.1, "share of rising rate; a cosine follows", low=0, high=1),
    "save_every": Setting(10, 10, "updates between checkpoints; ours"),
}

PRESETS = {  # phase -> name -> Setting, None where a row of "all" is no flag of the phase
    "all": {
        "model": Setting("Qwen/Qwen3-VL-4B-Instruct", "toy/base", "base model: folder or hub id"),
        "quantize": Setting("nf4", "none", "4-bit; double quantisation is ours", ("nf4", "none")),
        "dtype": Setting("bfloat16", "float32", "of the weights; ours", ("bfloat16", "float32")),
        "checkpointing": Setting("on", "off", "recompute activations; ours", ("on", "off")),
        "max_pixels": Setting(2**20, 96**2, "larger images are reduced to this; ours", low=1024),
        "steps": Setting(2, 2, "T, refinement steps after step 0", high=20),
        "feedback": Setting(
            "overlay",
            "overlay",
            "before step t: box t - 1 on the image, or its surroundings enlarged (ours: zoom), or "
            "these without the box, and the question of step 0 again (again)",
            ("overlay", "zoom", "again"),
        ),
        "surroundings": Setting(2.0, 1.5, "zoom: sides of the view, in the box's; ours", high=100),
        "seed": Setting(0, 0, "of everything random; ours", low=0, high=2**31 - 1),
    },
    "make_data": {
        **ENGINE,
        "train_samples": Setting(2400, 2400, "training samples, a third from each source"),
        "val_samples": Setting(510, 510, "validation samples, a third from each source"),
        "test_samples": Setting(505, 505, "test samples: 169 + 168 + 168"),
        "iou_max": Setting(0.85, 0.85, "a box above it leaves no room to improve", low=0, high=1),
        "right_boxes": Setting(
            "drop", "keep", "what becomes of these: keep, as one step (ours)", ("drop", "keep")
        ),
        "start": Setting(
            "student", "student", "step 0: the student's, or perturbed", ("student", "perturbed")
        ),
        "teacher": Setting("vlm", "template", "what writes the traces", ("vlm", "template")),
        "batch_size": Setting(0, 128, "samples decoded at once; 0: what fits; ours", low=0),
    },
    "sft": {
        **TRAINING,
        "lr": Setting(2e-5, 6e-3, "peak learning rate", low=1e-9, high=1),
        "epochs": Setting(10, 2, "passes over the trajectories"),
        "batch_size": Setting(4, 4, "trajectories per forward pass"),
        "grad_accum": Setting(4, 2, "forward passes per update"),
        "lora_rank": Setting(64, 32, "on all projections of the language model"),
        "lora_alpha": Setting(128, 64, "LoRA's scale is alpha / rank"),
    },
    "grpo": {
        **ENGINE,
        "steps": Setting(2, 2, "T; 0 trains Table 1's single-step control", low=0, high=20),
        "lr": Setting(2e-6, 7e-4, "learning rate; that it is constant is ours", low=1e-9, high=1),
        "group_size": Setting(6, 6, "N, trajectories per prompt", low=2, high=1000),
        "temperature_first": Setting(1.0, 1.0, "at step 0", low=0, high=10),
        "temperature": Setting(0.7, 0.7, "at the refinement steps", low=0, high=10),
        "beta": Setting(0.04, 0.01, "weight of the KL term", low=0, high=100),
        "guard": GUARD,
        "entropy": Setting(0.01, 0.0, "lambda, weight of the entropy", low=0, high=100),
        "kl": Setting("paper", "paper", "mean |log pi - log ref|; k3 is ours", ("paper", "k3")),
        "grad_accum": Setting(8, 16, "prompts per update: our reading of 8 accumulation steps"),
        "updates": Setting(300, 14, "300 x 8 is one pass over 2,400 prompts; ours"),
        "batch_size": Setting(0, 6, "trajectories per forward pass; 0: what fits; ours", low=0),
        "prompts_at_once": Setting(0, 32, "prompts decoded together; 0: what fits; ours", low=0),
        "val_every": Setting(25, 14, "updates between validations; ours"),
        "val_prompts": Setting(64, 510, "validation prompts; ours"),
        "save_every": Setting(5, 5, "updates between checkpoints; ours"),
    },
    "evaluate": {
        **ENGINE,
        "batch_size": Setting(0, 128, "samples decoded at once; 0: what fits; ours", low=0),
        "guard": GUARD,
    },
    "merge": {"quantize": None},  # it takes the weights in full
    "visrl.make_data": {
        **VISRL,
        "sft_samples": Setting(30647, 48, "samples with boxes, for SFT (Table 7)"),
        "train_samples": Setting(180000, 600, "questions without boxes, for RL (Table 7)"),
        "test_samples": Setting(8281, 450, "test samples; of the paper's benchmark all (Table 2)"),
    },
    "visrl.sft": {
        **VISRL,
        **TRAINING,
        "lr": Setting(1e-4, 2e-3, "peak learning rate", low=1e-9, high=1),
        "epochs": Setting(3, 2, "passes over the samples"),
        "batch_size": Setting(2, 16, "samples per forward pass"),
        "grad_accum": Setting(8, 1, "forward passes per update"),
        "lora_rank": Setting(8, 32, "on all projections of the language model"),
        "lora_alpha": Setting(16, 64, "LoRA's scale is alpha / rank"),
        "samples": Setting(0, 0, "how many of them, for Table 3; 0: all; ours", low=0),
    },
    "visrl.make_pairs": {
        **VISRL_ENGINE,
        "iteration": Setting(1, 1, "the first starts from the SFT model", high=99),
        "attempts": Setting(3, 3, "of two paths each, for each question", high=99),
        "temperature": Setting(2.0, 1.0, "of boxes and answers", low=0.01, high=10),
        "top_p": Setting(0.7, 1.0, "share of the mass that is sampled from", low=0.01, high=1),
        "top_k": Setting(50, 0, "tokens that are sampled from, before top_p; 0: all", low=0),
        "iou_max": Setting(0.05, 0.05, "tau of Eq. 3: boxes that overlap more", low=0, high=1),
        "win": Setting(0.8, 0.8, "a winning path has both scores from here on", low=0, high=1),
        "lose": Setting(0.2, 0.2, "a losing path has both scores up to here", low=0, high=1),
        "critic": Setting(
            "prompted",
            "likelihood",
            "prompts for JSON scores; likelihood is ours, for a base too small to follow them",
            ("prompted", "likelihood"),
        ),
        "batch_size": Setting(4, 16, "questions at once; ours"),
    },
    "visrl.dpo": {
        **VISRL,
        **TRAINING,
        "iteration": Setting(1, 1, "whose pairs are learnt from", high=99),
        "lr": Setting(5e-6, 1e-4, "peak learning rate", low=1e-9, high=1),
        "beta": Setting(0.1, 0.1, "nearness to the reference", low=0, high=100),
        "nll": Setting(0.0, 1.0, "weight of the chosen path's mean -log pi; ours", low=0, high=100),
        "epochs": Setting(5, 2, "passes over the pairs"),
        "batch_size": Setting(3, 8, "pairs per forward pass"),
        "grad_accum": Setting(8, 1, "forward passes per update"),
    },
    "visrl.evaluate": {
        **VISRL_ENGINE,
        "batch_size": Setting(6, 128, "samples decoded at once; ours"),
        "judge": Setting("base", "none", "the base scores answers too, 0..1", ("base", "none")),
    },
}


def settings_of(phase):
    """name -> Setting of all flags of a phase that are hyperparameters; None: of any script."""
    settings = {**PRESETS["all"], **PRESETS.get(phase, {})}
    return {name: setting for name, setting in settings.items() if setting}
