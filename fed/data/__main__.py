from fed.data.make_clients import main
from llava.errors import one_clear_error

with one_clear_error():
    main()
