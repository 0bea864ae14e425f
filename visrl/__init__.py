"""VisRL (arXiv:2503.07523). README.md says how it goes; then read loop.py and the phases in their
order: make_data, sft, make_pairs, dpo, evaluate."""

import support  # noqa: F401  sets how threads wait, which has to come before torch is imported
