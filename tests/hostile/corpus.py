"""All broken inputs, border by border."""

import importlib.util

from tests.hostile.caches import cache_cases
from tests.hostile.case import Case
from tests.hostile.configs import config_cases
from tests.hostile.files import file_cases
from tests.hostile.jobs import job_cases
from tests.hostile.models import model_cases
from tests.hostile.rows import row_cases
from tests.hostile.tokenizers import template_cases, tokenizer_cases

CASES: list[Case] = [
    *row_cases(),
    *file_cases(),
    *tokenizer_cases(),
    *template_cases(),
    *model_cases(),
    *config_cases(),
    *cache_cases(),
    *job_cases(harness=importlib.util.find_spec("lm_eval") is not None),
]
