"""Problems: prompts with images, answers and teachers, from the embedded world or from data files."""
