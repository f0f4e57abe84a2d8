"""What can be measured of one client's data before it joins; numpy in, numbers out, nothing leaves."""
