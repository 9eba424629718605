"""What the pages draw, aggregated: runs of any size become a document of bounded size (figures.json)."""
