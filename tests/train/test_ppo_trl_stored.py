"""PPO's quantities, losses and gradients against TRL 1.12's, as tests/oracle/test_ppo_trl.py stored them."""

import numpy as np
import pytest

from tests.train.trl_cases import CASES, GOLDEN, compare


@pytest.mark.parametrize("case", CASES)
def test_update_is_trls_stored(case):
    stored = np.load(GOLDEN)
    kept = {k.removeprefix(f"{case}/"): stored[k] for k in stored.files if k.startswith(f"{case}/")}
    assert kept, "nothing stored: comparing nothing cannot fail"
    compare(case, kept)
