"""What no paper describes: flags, files, checkpoints, samples, processes, statistics, pictures."""

import common  # noqa: F401  sets how threads wait, which has to come before torch is imported
