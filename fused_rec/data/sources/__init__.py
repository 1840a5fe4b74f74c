"""One reader for each public dataset or format, and the download of public files."""
