"""edgeprompt beside other runtimes, side by side in one run."""
