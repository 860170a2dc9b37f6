from hypothesis import settings

# A deadline per example measures how busy the machine is.
settings.register_profile("mutoscope", deadline=None)
settings.load_profile("mutoscope")
