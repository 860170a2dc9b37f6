import atexit
import os
import shutil
import tempfile

from hypothesis import settings

# What is remembered between runs is not remembered between test runs, nor left in the home of whoever runs them.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="mutoscope-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

# A deadline per example measures how busy the machine is.
settings.register_profile("mutoscope", deadline=None)
settings.load_profile("mutoscope")
