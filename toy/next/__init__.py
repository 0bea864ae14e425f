"""A base that can see, in the making: it is to replace the toy's world and base.

    python -m toy.next.train      the recipe, from nothing; killed, the same command goes on
    python -m toy.next.skills     what a base can do, beside chance and the targets

No weights are here yet: a run of the whole recipe takes about an hour and a quarter on two idle
cores and has not been made. TRIES.md has what was learnt on the way. No phase uses this package.
"""

import common  # noqa: F401  sets how threads wait, which has to come before torch is imported
