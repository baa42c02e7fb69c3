"""What becomes of measured times: the public face of results, verdicts, pictures and pages."""

from .pages import *  # noqa: F403
from .plots import *  # noqa: F403
from .result import *  # noqa: F403
from .verdicts import *  # noqa: F403
