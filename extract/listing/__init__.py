"""List the videos to extract, from folders, CSV files and label lists."""
