"""What there is to extract: folders, CSV files and label lists become a listing of videos."""
