"""The page for people who have not installed anything: choices in, pictures out; Gradio only in `page`."""
