"""Who does the work of an extraction: a driver, one worker in this process, or Ray actors."""
