"""Where the self-contained executable begins."""

if __name__ == "__main__":
    from taskd.interpreter import main

    main()
