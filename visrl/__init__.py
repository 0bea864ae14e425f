"""VisRL (arXiv:2503.07523): a model names a focus box, sees it cut out, and answers; it learns
where to look from answers alone.

README.md says how it goes. Then read loop.py, what the phases share, and the phases in their order:
make_data, sft, make_pairs, dpo, evaluate. Beside them: sources.py, where the samples come from;
critics.py; report.py, tables and the page.
"""

import support  # noqa: F401  sets how threads wait, which has to come before torch is imported
