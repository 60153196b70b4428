"""`python -m tests.pipeline.scripted_run ARGS`: python -m pipeline.run with the scripted engine in the place of a model."""

import sys

from pipeline.run import main
from tests.pipeline.scripted_engine import ScriptedModel

if __name__ == "__main__":
    sys.exit(main(engine_factory=ScriptedModel))
