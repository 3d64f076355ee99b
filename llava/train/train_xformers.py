"""The entry of upstream's xformers script: torch's own attention does what xformers did there."""

from llava.train.train import main

if __name__ == "__main__":
    main()
