"""The `accelerate` command beside a CPU build of torch, where its import of torchvision fails (import_open_clip)."""

from ldm.models.text import import_open_clip

if __name__ == "__main__":
    import_open_clip()
    from accelerate.commands.accelerate_cli import main

    main()
