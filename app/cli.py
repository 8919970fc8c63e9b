"""`whetstone`: the command line. A command is a function in app/commands and a line here."""

from __future__ import annotations

import typer

from app.commands import ask, conversations, data, doctor, index, keys, learn, record, serve

app = typer.Typer(
    help="A chat agent that gets better overnight from its own verified conversations.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.command()(serve.up)
app.command()(ask.ask)
app.add_typer(record.versions, name="versions")
app.command()(record.queue)
app.command()(record.runs)
app.add_typer(conversations.conversations, name="conversations")
app.add_typer(data.data, name="data")
app.command()(learn.train)
app.command()(learn.warmup)
app.command("eval")(learn.evaluate)
app.add_typer(index.index, name="index")
app.add_typer(keys.keys, name="keys")
app.command()(doctor.doctor)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
