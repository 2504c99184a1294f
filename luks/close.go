package luks

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// uuidPrefix is how the device-mapper UUID of a LUKS2 mapping begins, whoever made it.
const uuidPrefix = "CRYPT-LUKS2-"

// Close removes the mapping NAME. While something holds it (udev for moments, a mount for good) it tries again until ctx ends, and then
// returns [ErrBusy] with the cause of ctx. [ErrNotOpen]: there is no such mapping. Only mappings of LUKS2 volumes are removed.
func Close(ctx context.Context, name string) error {
	if err := checkName(name); err != nil {
		return fmt.Errorf("cannot close a mapping: %w", err)
	}
	if err := kernelMapper().close(ctx, name); err != nil {
		return fmt.Errorf("cannot close %s: %w", name, err)
	}
	return nil
}

// CloseUnfinished removes the mapping NAME if it is one of a LUKS2 volume that [Inspection.Open] was killed over: the kernel has a table, or not
// even that, and nobody ever saw a volume. No such mapping is no error.
func CloseUnfinished(ctx context.Context, name string) error {
	if err := kernelMapper().closeUnfinished(ctx, name); err != nil {
		return fmt.Errorf("cannot close the unfinished %s: %w", name, err)
	}
	return nil
}

func (dm mapper) closeUnfinished(ctx context.Context, name string) error {
	info, err := dm.info(name)
	if err != nil || info.Flags&unix.DM_ACTIVE_PRESENT_FLAG != 0 || !strings.HasPrefix(info.UUID, uuidPrefix) {
		return nil
	}
	return dm.close(ctx, name)
}

func (dm mapper) close(ctx context.Context, name string) error {
	info, err := dm.info(name)
	if err != nil {
		return closeError(err)
	}
	if !strings.HasPrefix(info.UUID, uuidPrefix) {
		return fmt.Errorf("it is not a LUKS2 mapping (its device-mapper UUID is %q)", info.UUID)
	}
	for pause := 5 * time.Millisecond; ; pause = min(2*pause, 200*time.Millisecond) {
		err := dm.remove(name)
		if err == nil {
			dm.unlink(name)
			return nil
		}
		if !errors.Is(err, unix.EBUSY) {
			return closeError(err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", ErrBusy, context.Cause(ctx))
		case <-time.After(pause):
		}
	}
}

func closeError(err error) error {
	switch {
	case noControl(err):
		return fmt.Errorf("%w: %w", ErrNoDMCrypt, err)
	case errors.Is(err, unix.ENXIO):
		return ErrNotOpen
	}
	return err
}
