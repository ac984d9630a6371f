import os
import signal
import threading
from contextlib import suppress

import pytest

from cl_runner.interrupt import Interrupt, Stopped, heed_all

STATUS = {signal.SIGTERM: 143, signal.SIGUSR2: 140, signal.SIGINT: 130, signal.SIGHUP: 129}


@pytest.fixture(autouse=True)
def _as_it_was():
    before = {number: signal.getsignal(number) for number in STATUS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "status"), STATUS.items())
def test_a_signal_stops_a_run_at_once_where_nothing_is_lost_by_it(number, status):
    interrupt = Interrupt()
    with pytest.raises(Stopped) as stopped, interrupt.listening():
        send(number)
    assert (stopped.value.name, stopped.value.status) == (number.name, status)
    assert interrupt.stopping == number.name


def test_a_signal_waits_until_all_is_saved():
    interrupt, told = Interrupt(), []
    interrupt.soon = lambda: told.append("soon")
    with interrupt.listening():
        with interrupt.deferred():
            send(signal.SIGUSR2)
            assert told == ["soon"]
            assert interrupt.asked == "SIGUSR2"
        interrupt.place = "goes on at task 1, step 7"
        with pytest.raises(Stopped, match="^stopped; the same command goes on at task 1, step 7$"):
            interrupt.heed()


def test_a_run_that_was_to_be_made_again_does_not_go_on_by_being_made_again():
    says = "^stopped; the same command without rerun=true begins anew$"
    with pytest.raises(Stopped, match=says), Interrupt(rerun=True).listening():
        send(signal.SIGTERM)


def test_nothing_is_heeded_that_nobody_asked_for():
    Interrupt().heed()


def test_the_second_ctrl_c_stops_at_once():
    interrupt = Interrupt()
    with interrupt.listening(), interrupt.deferred():
        send(signal.SIGINT)
        with pytest.raises(Stopped):
            send(signal.SIGINT)


def test_further_signals_do_not_disturb_a_run_that_is_stopping():
    interrupt = Interrupt()
    with interrupt.listening():
        with pytest.raises(Stopped):
            send(signal.SIGTERM)
        send(signal.SIGTERM)
        send(signal.SIGUSR2)


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in STATUS]
    with Interrupt().listening():
        assert all(signal.getsignal(number) not in before for number in STATUS)
    assert [signal.getsignal(number) for number in STATUS] == before


def test_a_signal_that_is_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Interrupt().listening():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_thread_other_than_the_main_one_runs_without_handlers():
    before = [signal.getsignal(number) for number in STATUS]
    seen = []

    def run():
        with Interrupt().listening():
            seen.extend(signal.getsignal(number) for number in STATUS)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == before


def test_a_launchers_handler_is_called_when_nothing_of_the_run_is_left():
    called = []
    signal.signal(signal.SIGUSR2, lambda number, frame: called.append(number))
    interrupt = Interrupt()
    with pytest.raises(Stopped) as stopped, interrupt.listening():
        send(signal.SIGUSR2)
    assert not called
    interrupt.hand_on(stopped.value)
    assert called == [signal.SIGUSR2]


def test_nobody_is_called_where_only_pythons_own_handlers_were():
    interrupt = Interrupt()
    with pytest.raises(Stopped) as stopped, interrupt.listening():
        send(signal.SIGINT)
    interrupt.hand_on(stopped.value)  # the default handler would raise KeyboardInterrupt


def test_sigterm_that_a_launcher_takes_care_of_only_has_the_run_saved():
    called = []
    signal.signal(signal.SIGTERM, lambda number, frame: called.append(number))
    interrupt = Interrupt()
    with interrupt.listening():
        with interrupt.deferred():
            send(signal.SIGTERM)
            assert not called
        interrupt.heed()
        assert called == [signal.SIGTERM]
        assert (interrupt.asked, interrupt.stopping) == (None, None)
        send(signal.SIGTERM)
        assert len(called) == 2


def test_a_launcher_that_ends_the_process_on_sigterm_is_known_to_have_stopped_the_run():
    signal.signal(signal.SIGTERM, lambda number, frame: exit(9))
    interrupt = Interrupt()
    with pytest.raises(SystemExit), interrupt.listening():
        send(signal.SIGTERM)
    assert interrupt.stopping == "SIGTERM"


def test_a_signal_within_a_job_of_a_sweep_stops_the_job_and_with_it_the_sweep():
    sweep, job = Interrupt(), Interrupt()
    with sweep.listening(), sweep.deferred():
        with pytest.raises(Stopped) as stopped, job.listening():
            send(signal.SIGTERM)
        job.hand_on(stopped.value)
        assert (job.stopping, sweep.asked, sweep.stopping) == ("SIGTERM", None, None)


def test_a_signal_between_two_jobs_waits_for_the_next():
    sweep = Interrupt()
    with sweep.listening(), sweep.deferred():
        heed_all()
        with Interrupt().listening():
            pass
        send(signal.SIGTERM)
        with pytest.raises(Stopped):
            heed_all()
    heed_all()


def test_a_launcher_around_a_sweep_is_called_for_the_job_that_it_stops():
    called = []
    signal.signal(signal.SIGTERM, lambda number, frame: called.append(number))
    job = Interrupt()
    with Interrupt().listening(), job.listening():
        send(signal.SIGTERM)
    assert called == [signal.SIGTERM]
    assert job.stopping is None


def test_a_stop_that_got_lost_in_a_callback_is_made_up_for():
    interrupt = Interrupt()
    with interrupt.listening():
        with suppress(Stopped):
            send(signal.SIGTERM)
        with pytest.raises(Stopped):
            interrupt.heed()


@pytest.mark.parametrize("times", [1, 3])
def test_what_is_written_while_a_run_stops_is_written_to_its_end(times):
    interrupt = Interrupt()
    with interrupt.listening():
        with pytest.raises(Stopped):
            send(signal.SIGINT)
        with interrupt.deferred():
            for _ in range(times):
                send(signal.SIGINT)
        with pytest.raises(Stopped):
            send(signal.SIGINT)
